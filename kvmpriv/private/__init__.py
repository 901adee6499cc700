"""The two ABIs of private memory, a module each: v9's restrictedmem, mainline's guest_memfd.

Nothing outside this folder knows which generation it speaks to.
"""

from . import guest_memfd, restrictedmem

__all__ = ["guest_memfd", "restrictedmem"]

"""The two ABIs of private memory, a module each: v9's restrictedmem, mainline's guest_memfd.

No room below knows which generation it speaks to; what it needs of one is handed down.
"""

from . import guest_memfd, restrictedmem

__all__ = ["guest_memfd", "restrictedmem"]

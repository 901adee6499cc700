"""The kernel's ABI, generated from the headers in ``cdefs/``: one namespace for each header.

``kvm`` is what all ABIs of private memory share, ``restrictedmem`` v9, ``restrictedmem_v10`` what
v10 changed, and ``guest_memfd`` mainline.  Each has its constants, ``REQUESTS`` (ioctl number ->
name) and ``ffi``, a cffi FFI with the structs.  ``*_structs`` are the structs' types.

Programs use :mod:`kvmpriv.uapi`.  ``cdefs/README.md`` in the source tree describes what is
generated, and how.
"""

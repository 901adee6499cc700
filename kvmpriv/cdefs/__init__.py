"""The kernel's ABI, a namespace a generation, generated from the headers in ``cdefs/``.

``kvm`` is what all share; ``restrictedmem`` is v9, ``restrictedmem_v10`` what v10 changed,
``guest_memfd`` mainline.  Each has its constants, ``REQUESTS`` (ioctl number -> name) and ``ffi``,
a cffi FFI that knows the structs.
"""

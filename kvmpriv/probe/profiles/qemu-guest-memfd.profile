# memory-backend-memfd with guest-memfd=on,share=on, for guests that are not confidential.
summary = QEMU's -object memory-backend-memfd,guest-memfd=on,share=on: all memory in a guest_memfd, all of it shared
source = qemu-devel | hostmem: Support fully shared guest memfd to back a VM, Peter Xu | posting of December 2025 | 2025-12-15
source = qemu/qemu | docs, Guest memfd: "Usage" | master | 2026-11-27
types = default
require = guest_memfd/VM/file | QEMU makes a guest_memfd for each memory backend
require = guest_memfd/VM/init_shared | QEMU asks for MMAP and INIT_SHARED, maps the file and gives the mapping to a slot
wish = guest_memfd/VM/punch_hole | a balloon and virtio-mem give memory back

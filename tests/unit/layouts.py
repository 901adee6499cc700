"""Sizes and offsets of the ABI on x86-64, in bytes: literals, so that a moved field is noticed.

A dict for each header of cdefs/, with the header's name.  KVM is what a compiler makes of
<linux/kvm.h> and <asm/kvm.h> of Linux 6.1; the others are as their series and releases were posted.
"""

# fmt: off
Layout = tuple[int, dict[str, int]]

KVM: dict[str, Layout] = {
    "kvm_clear_dirty_log": (24, {
        "slot": 0, "num_pages": 4, "first_page": 8, "dirty_bitmap": 16, "padding2": 16,
    }),
    "kvm_clock_data": (48, {
        "clock": 0, "flags": 8, "pad0": 12, "realtime": 16, "host_tsc": 24, "pad": 32,
    }),
    "kvm_cpuid2": (8, {
        "nent": 0, "padding": 4, "entries": 8,
    }),
    "kvm_cpuid_entry2": (40, {
        "function": 0, "index": 4, "flags": 8, "eax": 12, "ebx": 16, "ecx": 20, "edx": 24,
        "padding": 28,
    }),
    "kvm_debug_exit_arch": (32, {
        "exception": 0, "pad": 4, "pc": 8, "dr6": 16, "dr7": 24,
    }),
    "kvm_debugregs": (128, {
        "db": 0, "dr6": 32, "dr7": 40, "flags": 48, "reserved": 56,
    }),
    "kvm_dirty_log": (16, {
        "slot": 0, "padding1": 4, "dirty_bitmap": 8, "padding2": 8,
    }),
    "kvm_dtable": (16, {
        "base": 0, "limit": 8, "padding": 10,
    }),
    "kvm_enable_cap": (104, {
        "cap": 0, "flags": 4, "args": 8, "pad": 40,
    }),
    "kvm_enc_region": (16, {
        "addr": 0, "size": 8,
    }),
    "kvm_fpu": (416, {
        "fpr": 0, "fcw": 128, "fsw": 130, "ftwx": 132, "pad1": 133, "last_opcode": 134,
        "last_ip": 136, "last_dp": 144, "xmm": 152, "mxcsr": 408, "pad2": 412,
    }),
    "kvm_guest_debug": (72, {
        "control": 0, "pad": 4, "arch": 8,
    }),
    "kvm_guest_debug_arch": (64, {
        "debugreg": 0,
    }),
    "kvm_hyperv_exit": (56, {
        "type": 0, "pad1": 4, "u": 8, "u.synic": 8, "u.synic.msr": 8, "u.synic.pad2": 12,
        "u.synic.control": 16, "u.synic.evt_page": 24, "u.synic.msg_page": 32, "u.hcall": 8,
        "u.hcall.input": 8, "u.hcall.result": 16, "u.hcall.params": 24, "u.syndbg": 8,
        "u.syndbg.msr": 8, "u.syndbg.pad2": 12, "u.syndbg.control": 16, "u.syndbg.status": 24,
        "u.syndbg.send_page": 32, "u.syndbg.recv_page": 40, "u.syndbg.pending_page": 48,
    }),
    "kvm_interrupt": (4, {
        "irq": 0,
    }),
    "kvm_ioeventfd": (64, {
        "datamatch": 0, "addr": 8, "len": 16, "fd": 20, "flags": 24, "pad": 28,
    }),
    "kvm_irq_level": (8, {
        "irq": 0, "status": 0, "level": 4,
    }),
    "kvm_irq_routing": (8, {
        "nr": 0, "flags": 4, "entries": 8,
    }),
    "kvm_irq_routing_entry": (48, {
        "gsi": 0, "type": 4, "flags": 8, "pad": 12, "u": 16, "u.irqchip": 16, "u.msi": 16,
        "u.pad": 16,
    }),
    "kvm_irq_routing_irqchip": (8, {
        "irqchip": 0, "pin": 4,
    }),
    "kvm_irq_routing_msi": (16, {
        "address_lo": 0, "address_hi": 4, "data": 8, "pad": 12, "devid": 12,
    }),
    "kvm_irqfd": (32, {
        "fd": 0, "gsi": 4, "flags": 8, "resamplefd": 12, "pad": 16,
    }),
    "kvm_lapic_state": (1024, {
        "regs": 0,
    }),
    "kvm_mp_state": (4, {
        "mp_state": 0,
    }),
    "kvm_msi": (32, {
        "address_lo": 0, "address_hi": 4, "data": 8, "flags": 12, "devid": 16, "pad": 20,
    }),
    "kvm_msr_entry": (16, {
        "index": 0, "reserved": 4, "data": 8,
    }),
    "kvm_msr_list": (4, {
        "nmsrs": 0, "indices": 4,
    }),
    "kvm_msrs": (8, {
        "nmsrs": 0, "pad": 4, "entries": 8,
    }),
    "kvm_pit_config": (64, {
        "flags": 0, "pad": 4,
    }),
    "kvm_regs": (144, {
        "rax": 0, "rbx": 8, "rcx": 16, "rdx": 24, "rsi": 32, "rdi": 40, "rsp": 48, "rbp": 56,
        "r8": 64, "r9": 72, "r10": 80, "r11": 88, "r12": 96, "r13": 104, "r14": 112, "r15": 120,
        "rip": 128, "rflags": 136,
    }),
    "kvm_run": (2352, {
        "request_interrupt_window": 0, "immediate_exit": 1, "padding1": 2, "exit_reason": 8,
        "ready_for_interrupt_injection": 12, "if_flag": 13, "flags": 14, "cr8": 16,
        "apic_base": 24, "hw": 32, "hw.hardware_exit_reason": 32, "fail_entry": 32,
        "fail_entry.hardware_entry_failure_reason": 32, "fail_entry.cpu": 40, "ex": 32,
        "ex.exception": 32, "ex.error_code": 36, "io": 32, "io.direction": 32, "io.size": 33,
        "io.port": 34, "io.count": 36, "io.data_offset": 40, "debug": 32, "debug.arch": 32,
        "mmio": 32, "mmio.phys_addr": 32, "mmio.data": 40, "mmio.len": 48, "mmio.is_write": 52,
        "hypercall": 32, "hypercall.nr": 32, "hypercall.args": 40, "hypercall.ret": 88,
        "hypercall.longmode": 96, "hypercall.pad": 100, "tpr_access": 32, "tpr_access.rip": 32,
        "tpr_access.is_write": 40, "tpr_access.pad": 44, "internal": 32, "internal.suberror": 32,
        "internal.ndata": 36, "internal.data": 40, "emulation_failure": 32,
        "emulation_failure.suberror": 32, "emulation_failure.ndata": 36,
        "emulation_failure.flags": 40, "emulation_failure.insn_size": 48,
        "emulation_failure.insn_bytes": 49, "system_event": 32, "system_event.type": 32,
        "system_event.ndata": 36, "system_event.data": 40, "eoi": 32, "eoi.vector": 32,
        "hyperv": 32, "msr": 32, "msr.error": 32, "msr.pad": 33, "msr.reason": 40,
        "msr.index": 44, "msr.data": 48, "notify": 32, "notify.flags": 32, "padding": 32,
        "kvm_valid_regs": 288, "kvm_dirty_regs": 296, "s": 304, "s.regs": 304, "s.padding": 304,
    }),
    "kvm_segment": (24, {
        "base": 0, "limit": 8, "selector": 12, "type": 14, "present": 15, "dpl": 16, "db": 17,
        "s": 18, "l": 19, "g": 20, "avl": 21, "unusable": 22, "padding": 23,
    }),
    "kvm_signal_mask": (4, {
        "len": 0, "sigset": 4,
    }),
    "kvm_sregs": (312, {
        "cs": 0, "ds": 24, "es": 48, "fs": 72, "gs": 96, "ss": 120, "tr": 144, "ldt": 168,
        "gdt": 192, "idt": 208, "cr0": 224, "cr2": 232, "cr3": 240, "cr4": 248, "cr8": 256,
        "efer": 264, "apic_base": 272, "interrupt_bitmap": 280,
    }),
    "kvm_sregs2": (320, {
        "cs": 0, "ds": 24, "es": 48, "fs": 72, "gs": 96, "ss": 120, "tr": 144, "ldt": 168,
        "gdt": 192, "idt": 208, "cr0": 224, "cr2": 232, "cr3": 240, "cr4": 248, "cr8": 256,
        "efer": 264, "apic_base": 272, "flags": 280, "pdptrs": 288,
    }),
    "kvm_stats_desc": (16, {
        "flags": 0, "exponent": 4, "size": 6, "offset": 8, "bucket_size": 12, "name": 16,
    }),
    "kvm_stats_header": (24, {
        "flags": 0, "name_size": 4, "num_desc": 8, "id_offset": 12, "desc_offset": 16,
        "data_offset": 20,
    }),
    "kvm_sync_regs": (520, {
        "regs": 0, "sregs": 144, "events": 456,
    }),
    "kvm_translation": (24, {
        "linear_address": 0, "physical_address": 8, "valid": 16, "writeable": 17, "usermode": 18,
        "pad": 19,
    }),
    "kvm_userspace_memory_region": (32, {
        "slot": 0, "flags": 4, "guest_phys_addr": 8, "memory_size": 16, "userspace_addr": 24,
    }),
    "kvm_vcpu_events": (64, {
        "exception": 0, "exception.injected": 0, "exception.nr": 1,
        "exception.has_error_code": 2, "exception.pending": 3, "exception.error_code": 4,
        "interrupt": 8, "interrupt.injected": 8, "interrupt.nr": 9, "interrupt.soft": 10,
        "interrupt.shadow": 11, "nmi": 12, "nmi.injected": 12, "nmi.pending": 13,
        "nmi.masked": 14, "nmi.pad": 15, "sipi_vector": 16, "flags": 20, "smi": 24,
        "smi.smm": 24, "smi.pending": 25, "smi.smm_inside_nmi": 26, "smi.latched_init": 27,
        "triple_fault": 28, "triple_fault.pending": 28, "reserved": 29,
        "exception_has_payload": 55, "exception_payload": 56,
    }),
    "kvm_xcr": (16, {
        "xcr": 0, "reserved": 4, "value": 8,
    }),
    "kvm_xcrs": (392, {
        "nr_xcrs": 0, "flags": 4, "xcrs": 8, "padding": 264,
    }),
}

_REGION = {
    "slot": 0, "flags": 4, "guest_phys_addr": 8, "memory_size": 16, "userspace_addr": 24,
}
RESTRICTEDMEM: dict[str, Layout] = {
    "kvm_userspace_memory_region_ext": (160, {
        "region": 0, "restricted_offset": 32, "restricted_fd": 40, "pad1": 44, "pad2": 48,
    }),
    "kvm_run_memory_fault": (24, {"flags": 0, "padding": 4, "gpa": 8, "size": 16}),
}
RESTRICTEDMEM_V10: dict[str, Layout] = {
    "kvm_memory_attributes": (32, {"address": 0, "size": 8, "attributes": 16, "flags": 24}),
}
GUEST_MEMFD: dict[str, Layout] = {
    "kvm_userspace_memory_region2": (160, {
        **_REGION, "guest_memfd_offset": 32, "guest_memfd": 40, "pad1": 44, "pad2": 48,
    }),
    "kvm_memory_attributes": (32, {"address": 0, "size": 8, "attributes": 16, "flags": 24}),
    "kvm_memory_attributes2": (128, {
        "address": 0, "offset": 0, "size": 8, "attributes": 16, "flags": 24, "error_offset": 32,
        "reserved": 40,
    }),
    "kvm_create_guest_memfd": (64, {"size": 0, "flags": 8, "reserved": 16}),
    "kvm_pre_fault_memory": (64, {"gpa": 0, "size": 8, "flags": 16, "padding": 24}),
    "kvm_run_memory_fault": (24, {"flags": 0, "gpa": 8, "size": 16}),
}
UNMERGED: dict[str, Layout] = {
    "kvm_userspace_memory_region2": (160, {
        **_REGION, "guest_memfd_offset": 32, "guest_memfd": 40, "pad1": 44, "userfault_bitmap": 48,
        "pad2": 56,
    }),
}
VHOST: dict[str, Layout] = {
    "vhost_vring_state": (8, {"index": 0, "num": 4}),
    "vhost_vring_file": (8, {"index": 0, "fd": 4}),
    "vhost_vring_addr": (40, {
        "index": 0, "flags": 4, "desc_user_addr": 8, "used_user_addr": 16, "avail_user_addr": 24,
        "log_guest_addr": 32,
    }),
    "vhost_memory_region": (32, {
        "guest_phys_addr": 0, "memory_size": 8, "userspace_addr": 16, "flags_padding": 24,
    }),
    "vhost_memory": (8, {"nregions": 0, "padding": 4, "regions": 8}),
}

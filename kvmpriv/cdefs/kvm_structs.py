"""The structs of cdefs/kvm.h, for annotations.

A Protocol per struct, with its name and its fields; the objects are cffi pointers.
Generated from cdefs/kvm.h by `make cdefs`: edit the header instead.
"""

from __future__ import annotations

from typing import Protocol

from .cffi_types import Array

__all__ = [
    "kvm_clear_dirty_log",
    "kvm_clock_data",
    "kvm_cpuid2",
    "kvm_cpuid_entry2",
    "kvm_debug_exit_arch",
    "kvm_debugregs",
    "kvm_dirty_log",
    "kvm_dtable",
    "kvm_enable_cap",
    "kvm_enc_region",
    "kvm_fpu",
    "kvm_guest_debug",
    "kvm_guest_debug_arch",
    "kvm_hyperv_exit",
    "kvm_hyperv_exit_u",
    "kvm_hyperv_exit_u_hcall",
    "kvm_hyperv_exit_u_syndbg",
    "kvm_hyperv_exit_u_synic",
    "kvm_interrupt",
    "kvm_ioeventfd",
    "kvm_irq_level",
    "kvm_irq_routing",
    "kvm_irq_routing_entry",
    "kvm_irq_routing_entry_u",
    "kvm_irq_routing_irqchip",
    "kvm_irq_routing_msi",
    "kvm_irqfd",
    "kvm_lapic_state",
    "kvm_mp_state",
    "kvm_msi",
    "kvm_msr_entry",
    "kvm_msr_list",
    "kvm_msrs",
    "kvm_pit_config",
    "kvm_regs",
    "kvm_run",
    "kvm_run_debug",
    "kvm_run_emulation_failure",
    "kvm_run_eoi",
    "kvm_run_ex",
    "kvm_run_fail_entry",
    "kvm_run_hw",
    "kvm_run_hypercall",
    "kvm_run_internal",
    "kvm_run_io",
    "kvm_run_mmio",
    "kvm_run_msr",
    "kvm_run_notify",
    "kvm_run_s",
    "kvm_run_system_event",
    "kvm_run_tpr_access",
    "kvm_segment",
    "kvm_signal_mask",
    "kvm_sregs",
    "kvm_sregs2",
    "kvm_sregs_common",
    "kvm_stats_desc",
    "kvm_stats_header",
    "kvm_sync_regs",
    "kvm_translation",
    "kvm_userspace_memory_region",
    "kvm_vcpu_events",
    "kvm_vcpu_events_exception",
    "kvm_vcpu_events_interrupt",
    "kvm_vcpu_events_nmi",
    "kvm_vcpu_events_smi",
    "kvm_vcpu_events_triple_fault",
    "kvm_xcr",
    "kvm_xcrs",
]


class kvm_sregs_common(Protocol):
    """How kvm_sregs and kvm_sregs2 begin."""

    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: int  # __u64
    cr2: int  # __u64
    cr3: int  # __u64
    cr4: int  # __u64
    cr8: int  # __u64
    efer: int  # __u64
    apic_base: int  # __u64


class kvm_clear_dirty_log(Protocol):
    """struct kvm_clear_dirty_log: 24 bytes."""

    slot: int  # __u32
    num_pages: int  # __u32
    first_page: int  # __u64
    dirty_bitmap: object  # void *
    padding2: int  # __u64


class kvm_clock_data(Protocol):
    """struct kvm_clock_data: 48 bytes."""

    clock: int  # __u64
    flags: int  # __u32
    pad0: int  # __u32
    realtime: int  # __u64
    host_tsc: int  # __u64
    pad: Array[int]  # __u32[4]


class kvm_cpuid2(Protocol):
    """struct kvm_cpuid2: 8 bytes."""

    nent: int  # __u32
    padding: int  # __u32
    entries: Array[kvm_cpuid_entry2]  # kvm_cpuid_entry2[]


class kvm_cpuid_entry2(Protocol):
    """struct kvm_cpuid_entry2: 40 bytes."""

    function: int  # __u32
    index: int  # __u32
    flags: int  # __u32
    eax: int  # __u32
    ebx: int  # __u32
    ecx: int  # __u32
    edx: int  # __u32
    padding: Array[int]  # __u32[3]


class kvm_debug_exit_arch(Protocol):
    """struct kvm_debug_exit_arch: 32 bytes."""

    exception: int  # __u32
    pad: int  # __u32
    pc: int  # __u64
    dr6: int  # __u64
    dr7: int  # __u64


class kvm_debugregs(Protocol):
    """struct kvm_debugregs: 128 bytes."""

    db: Array[int]  # __u64[4]
    dr6: int  # __u64
    dr7: int  # __u64
    flags: int  # __u64
    reserved: Array[int]  # __u64[9]


class kvm_dirty_log(Protocol):
    """struct kvm_dirty_log: 16 bytes."""

    slot: int  # __u32
    padding1: int  # __u32
    dirty_bitmap: object  # void *
    padding2: int  # __u64


class kvm_dtable(Protocol):
    """struct kvm_dtable: 16 bytes."""

    base: int  # __u64
    limit: int  # __u16
    padding: Array[int]  # __u16[3]


class kvm_enable_cap(Protocol):
    """struct kvm_enable_cap: 104 bytes."""

    cap: int  # __u32
    flags: int  # __u32
    args: Array[int]  # __u64[4]
    pad: Array[int]  # __u8[64]


class kvm_enc_region(Protocol):
    """struct kvm_enc_region: 16 bytes."""

    addr: int  # __u64
    size: int  # __u64


class kvm_fpu(Protocol):
    """struct kvm_fpu: 416 bytes."""

    fpr: Array[Array[int]]  # __u8[8][16]
    fcw: int  # __u16
    fsw: int  # __u16
    ftwx: int  # __u8
    pad1: int  # __u8
    last_opcode: int  # __u16
    last_ip: int  # __u64
    last_dp: int  # __u64
    xmm: Array[Array[int]]  # __u8[16][16]
    mxcsr: int  # __u32
    pad2: int  # __u32


class kvm_guest_debug(Protocol):
    """struct kvm_guest_debug: 72 bytes."""

    control: int  # __u32
    pad: int  # __u32
    arch: kvm_guest_debug_arch


class kvm_guest_debug_arch(Protocol):
    """struct kvm_guest_debug_arch: 64 bytes."""

    debugreg: Array[int]  # __u64[8]


class kvm_hyperv_exit_u_synic(Protocol):
    """struct, a field of another: 32 bytes."""

    msr: int  # __u32
    pad2: int  # __u32
    control: int  # __u64
    evt_page: int  # __u64
    msg_page: int  # __u64


class kvm_hyperv_exit_u_hcall(Protocol):
    """struct, a field of another: 32 bytes."""

    input: int  # __u64
    result: int  # __u64
    params: Array[int]  # __u64[2]


class kvm_hyperv_exit_u_syndbg(Protocol):
    """struct, a field of another: 48 bytes."""

    msr: int  # __u32
    pad2: int  # __u32
    control: int  # __u64
    status: int  # __u64
    send_page: int  # __u64
    recv_page: int  # __u64
    pending_page: int  # __u64


class kvm_hyperv_exit_u(Protocol):
    """union, a field of another: 48 bytes."""

    synic: kvm_hyperv_exit_u_synic  # struct
    hcall: kvm_hyperv_exit_u_hcall  # struct
    syndbg: kvm_hyperv_exit_u_syndbg  # struct


class kvm_hyperv_exit(Protocol):
    """struct kvm_hyperv_exit: 56 bytes."""

    type: int  # __u32
    pad1: int  # __u32
    u: kvm_hyperv_exit_u  # union


class kvm_interrupt(Protocol):
    """struct kvm_interrupt: 4 bytes."""

    irq: int  # __u32


class kvm_ioeventfd(Protocol):
    """struct kvm_ioeventfd: 64 bytes."""

    datamatch: int  # __u64
    addr: int  # __u64
    len: int  # __u32
    fd: int  # __s32
    flags: int  # __u32
    pad: Array[int]  # __u8[36]


class kvm_irq_level(Protocol):
    """struct kvm_irq_level: 8 bytes."""

    irq: int  # __u32
    status: int  # __s32
    level: int  # __u32


class kvm_irq_routing(Protocol):
    """struct kvm_irq_routing: 8 bytes."""

    nr: int  # __u32
    flags: int  # __u32
    entries: Array[kvm_irq_routing_entry]  # kvm_irq_routing_entry[]


class kvm_irq_routing_entry_u(Protocol):
    """union, a field of another: 32 bytes."""

    irqchip: kvm_irq_routing_irqchip
    msi: kvm_irq_routing_msi
    pad: Array[int]  # __u32[8]


class kvm_irq_routing_entry(Protocol):
    """struct kvm_irq_routing_entry: 48 bytes."""

    gsi: int  # __u32
    type: int  # __u32
    flags: int  # __u32
    pad: int  # __u32
    u: kvm_irq_routing_entry_u  # union


class kvm_irq_routing_irqchip(Protocol):
    """struct kvm_irq_routing_irqchip: 8 bytes."""

    irqchip: int  # __u32
    pin: int  # __u32


class kvm_irq_routing_msi(Protocol):
    """struct kvm_irq_routing_msi: 16 bytes."""

    address_lo: int  # __u32
    address_hi: int  # __u32
    data: int  # __u32
    pad: int  # __u32
    devid: int  # __u32


class kvm_irqfd(Protocol):
    """struct kvm_irqfd: 32 bytes."""

    fd: int  # __u32
    gsi: int  # __u32
    flags: int  # __u32
    resamplefd: int  # __u32
    pad: Array[int]  # __u8[16]


class kvm_lapic_state(Protocol):
    """struct kvm_lapic_state: 1024 bytes."""

    regs: Array[bytes]  # char[1024]


class kvm_mp_state(Protocol):
    """struct kvm_mp_state: 4 bytes."""

    mp_state: int  # __u32


class kvm_msi(Protocol):
    """struct kvm_msi: 32 bytes."""

    address_lo: int  # __u32
    address_hi: int  # __u32
    data: int  # __u32
    flags: int  # __u32
    devid: int  # __u32
    pad: Array[int]  # __u8[12]


class kvm_msr_entry(Protocol):
    """struct kvm_msr_entry: 16 bytes."""

    index: int  # __u32
    reserved: int  # __u32
    data: int  # __u64


class kvm_msr_list(Protocol):
    """struct kvm_msr_list: 4 bytes."""

    nmsrs: int  # __u32
    indices: Array[int]  # __u32[]


class kvm_msrs(Protocol):
    """struct kvm_msrs: 8 bytes."""

    nmsrs: int  # __u32
    pad: int  # __u32
    entries: Array[kvm_msr_entry]  # kvm_msr_entry[]


class kvm_pit_config(Protocol):
    """struct kvm_pit_config: 64 bytes."""

    flags: int  # __u32
    pad: Array[int]  # __u32[15]


class kvm_regs(Protocol):
    """struct kvm_regs: 144 bytes."""

    rax: int  # __u64
    rbx: int  # __u64
    rcx: int  # __u64
    rdx: int  # __u64
    rsi: int  # __u64
    rdi: int  # __u64
    rsp: int  # __u64
    rbp: int  # __u64
    r8: int  # __u64
    r9: int  # __u64
    r10: int  # __u64
    r11: int  # __u64
    r12: int  # __u64
    r13: int  # __u64
    r14: int  # __u64
    r15: int  # __u64
    rip: int  # __u64
    rflags: int  # __u64


class kvm_run_hw(Protocol):
    """struct, a field of another: 8 bytes."""

    hardware_exit_reason: int  # __u64


class kvm_run_fail_entry(Protocol):
    """struct, a field of another: 16 bytes."""

    hardware_entry_failure_reason: int  # __u64
    cpu: int  # __u32


class kvm_run_ex(Protocol):
    """struct, a field of another: 8 bytes."""

    exception: int  # __u32
    error_code: int  # __u32


class kvm_run_io(Protocol):
    """struct, a field of another: 16 bytes."""

    direction: int  # __u8
    size: int  # __u8
    port: int  # __u16
    count: int  # __u32
    data_offset: int  # __u64


class kvm_run_debug(Protocol):
    """struct, a field of another: 32 bytes."""

    arch: kvm_debug_exit_arch


class kvm_run_mmio(Protocol):
    """struct, a field of another: 24 bytes."""

    phys_addr: int  # __u64
    data: Array[int]  # __u8[8]
    len: int  # __u32
    is_write: int  # __u8


class kvm_run_hypercall(Protocol):
    """struct, a field of another: 72 bytes."""

    nr: int  # __u64
    args: Array[int]  # __u64[6]
    ret: int  # __u64
    longmode: int  # __u32
    pad: int  # __u32


class kvm_run_tpr_access(Protocol):
    """struct, a field of another: 16 bytes."""

    rip: int  # __u64
    is_write: int  # __u32
    pad: int  # __u32


class kvm_run_internal(Protocol):
    """struct, a field of another: 136 bytes."""

    suberror: int  # __u32
    ndata: int  # __u32
    data: Array[int]  # __u64[16]


class kvm_run_emulation_failure(Protocol):
    """struct, a field of another: 32 bytes."""

    suberror: int  # __u32
    ndata: int  # __u32
    flags: int  # __u64
    insn_size: int  # __u8
    insn_bytes: Array[int]  # __u8[15]


class kvm_run_system_event(Protocol):
    """struct, a field of another: 136 bytes."""

    type: int  # __u32
    ndata: int  # __u32
    data: Array[int]  # __u64[16]


class kvm_run_eoi(Protocol):
    """struct, a field of another: 1 bytes."""

    vector: int  # __u8


class kvm_run_msr(Protocol):
    """struct, a field of another: 24 bytes."""

    error: int  # __u8
    pad: Array[int]  # __u8[7]
    reason: int  # __u32
    index: int  # __u32
    data: int  # __u64


class kvm_run_notify(Protocol):
    """struct, a field of another: 4 bytes."""

    flags: int  # __u32


class kvm_run_s(Protocol):
    """union, a field of another: 2048 bytes."""

    regs: kvm_sync_regs
    padding: Array[bytes]  # char[2048]


class kvm_run(Protocol):
    """struct kvm_run: 2352 bytes."""

    request_interrupt_window: int  # __u8
    immediate_exit: int  # __u8
    padding1: Array[int]  # __u8[6]
    exit_reason: int  # __u32
    ready_for_interrupt_injection: int  # __u8
    if_flag: int  # __u8
    flags: int  # __u16
    cr8: int  # __u64
    apic_base: int  # __u64
    hw: kvm_run_hw  # struct
    fail_entry: kvm_run_fail_entry  # struct
    ex: kvm_run_ex  # struct
    io: kvm_run_io  # struct
    debug: kvm_run_debug  # struct
    mmio: kvm_run_mmio  # struct
    hypercall: kvm_run_hypercall  # struct
    tpr_access: kvm_run_tpr_access  # struct
    internal: kvm_run_internal  # struct
    emulation_failure: kvm_run_emulation_failure  # struct
    system_event: kvm_run_system_event  # struct
    eoi: kvm_run_eoi  # struct
    hyperv: kvm_hyperv_exit
    msr: kvm_run_msr  # struct
    notify: kvm_run_notify  # struct
    padding: Array[bytes]  # char[256]
    kvm_valid_regs: int  # __u64
    kvm_dirty_regs: int  # __u64
    s: kvm_run_s  # union


class kvm_segment(Protocol):
    """struct kvm_segment: 24 bytes."""

    base: int  # __u64
    limit: int  # __u32
    selector: int  # __u16
    type: int  # __u8
    present: int  # __u8
    dpl: int  # __u8
    db: int  # __u8
    s: int  # __u8
    l: int  # __u8
    g: int  # __u8
    avl: int  # __u8
    unusable: int  # __u8
    padding: int  # __u8


class kvm_signal_mask(Protocol):
    """struct kvm_signal_mask: 4 bytes."""

    len: int  # __u32
    sigset: Array[int]  # __u8[]


class kvm_sregs(kvm_sregs_common, Protocol):
    """struct kvm_sregs: 312 bytes."""

    interrupt_bitmap: Array[int]  # __u64[4]


class kvm_sregs2(kvm_sregs_common, Protocol):
    """struct kvm_sregs2: 320 bytes."""

    flags: int  # __u64
    pdptrs: Array[int]  # __u64[4]


class kvm_stats_desc(Protocol):
    """struct kvm_stats_desc: 16 bytes."""

    flags: int  # __u32
    exponent: int  # __s16
    size: int  # __u16
    offset: int  # __u32
    bucket_size: int  # __u32
    name: Array[bytes]  # char[]


class kvm_stats_header(Protocol):
    """struct kvm_stats_header: 24 bytes."""

    flags: int  # __u32
    name_size: int  # __u32
    num_desc: int  # __u32
    id_offset: int  # __u32
    desc_offset: int  # __u32
    data_offset: int  # __u32


class kvm_sync_regs(Protocol):
    """struct kvm_sync_regs: 520 bytes."""

    regs: kvm_regs
    sregs: kvm_sregs
    events: kvm_vcpu_events


class kvm_translation(Protocol):
    """struct kvm_translation: 24 bytes."""

    linear_address: int  # __u64
    physical_address: int  # __u64
    valid: int  # __u8
    writeable: int  # __u8
    usermode: int  # __u8
    pad: Array[int]  # __u8[5]


class kvm_userspace_memory_region(Protocol):
    """struct kvm_userspace_memory_region: 32 bytes."""

    slot: int  # __u32
    flags: int  # __u32
    guest_phys_addr: int  # __u64
    memory_size: int  # __u64
    userspace_addr: int  # __u64


class kvm_vcpu_events_exception(Protocol):
    """struct, a field of another: 8 bytes."""

    injected: int  # __u8
    nr: int  # __u8
    has_error_code: int  # __u8
    pending: int  # __u8
    error_code: int  # __u32


class kvm_vcpu_events_interrupt(Protocol):
    """struct, a field of another: 4 bytes."""

    injected: int  # __u8
    nr: int  # __u8
    soft: int  # __u8
    shadow: int  # __u8


class kvm_vcpu_events_nmi(Protocol):
    """struct, a field of another: 4 bytes."""

    injected: int  # __u8
    pending: int  # __u8
    masked: int  # __u8
    pad: int  # __u8


class kvm_vcpu_events_smi(Protocol):
    """struct, a field of another: 4 bytes."""

    smm: int  # __u8
    pending: int  # __u8
    smm_inside_nmi: int  # __u8
    latched_init: int  # __u8


class kvm_vcpu_events_triple_fault(Protocol):
    """struct, a field of another: 1 bytes."""

    pending: int  # __u8


class kvm_vcpu_events(Protocol):
    """struct kvm_vcpu_events: 64 bytes."""

    exception: kvm_vcpu_events_exception  # struct
    interrupt: kvm_vcpu_events_interrupt  # struct
    nmi: kvm_vcpu_events_nmi  # struct
    sipi_vector: int  # __u32
    flags: int  # __u32
    smi: kvm_vcpu_events_smi  # struct
    triple_fault: kvm_vcpu_events_triple_fault  # struct
    reserved: Array[int]  # __u8[26]
    exception_has_payload: int  # __u8
    exception_payload: int  # __u64


class kvm_xcr(Protocol):
    """struct kvm_xcr: 16 bytes."""

    xcr: int  # __u32
    reserved: int  # __u32
    value: int  # __u64


class kvm_xcrs(Protocol):
    """struct kvm_xcrs: 392 bytes."""

    nr_xcrs: int  # __u32
    flags: int  # __u32
    xcrs: Array[kvm_xcr]  # kvm_xcr[16]
    padding: Array[int]  # __u64[16]

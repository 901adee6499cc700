# Generated from cdefs/kvm.h by `make cdefs`: edit the header instead.
# mypy: disable-error-code="overload-overlap"

from typing import Final, Literal, Protocol, overload

from .cffi_types import Cdata, CType, Ffi
from .kvm_structs import kvm_clear_dirty_log, kvm_clock_data, kvm_cpuid2, kvm_cpuid_entry2, kvm_debug_exit_arch, kvm_debugregs, kvm_dirty_log, kvm_dtable, kvm_enable_cap, kvm_enc_region, kvm_fpu, kvm_guest_debug, kvm_guest_debug_arch, kvm_hyperv_exit, kvm_interrupt, kvm_ioeventfd, kvm_irq_level, kvm_irq_routing, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_irqfd, kvm_lapic_state, kvm_mp_state, kvm_msi, kvm_msr_entry, kvm_msr_list, kvm_msrs, kvm_pit_config, kvm_regs, kvm_run, kvm_segment, kvm_signal_mask, kvm_sregs, kvm_sregs2, kvm_stats_desc, kvm_stats_header, kvm_sync_regs, kvm_translation, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcr, kvm_xcrs

class _Ffi(Ffi, Protocol):
    @overload
    def new(self, cdecl: Literal["struct kvm_clear_dirty_log *"], init: object = ..., /) -> kvm_clear_dirty_log: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_clock_data *"], init: object = ..., /) -> kvm_clock_data: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_cpuid2 *"], init: object = ..., /) -> kvm_cpuid2: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_cpuid_entry2 *"], init: object = ..., /) -> kvm_cpuid_entry2: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_debug_exit_arch *"], init: object = ..., /) -> kvm_debug_exit_arch: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_debugregs *"], init: object = ..., /) -> kvm_debugregs: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_dirty_log *"], init: object = ..., /) -> kvm_dirty_log: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_dtable *"], init: object = ..., /) -> kvm_dtable: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_enable_cap *"], init: object = ..., /) -> kvm_enable_cap: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_enc_region *"], init: object = ..., /) -> kvm_enc_region: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_fpu *"], init: object = ..., /) -> kvm_fpu: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_guest_debug *"], init: object = ..., /) -> kvm_guest_debug: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_guest_debug_arch *"], init: object = ..., /) -> kvm_guest_debug_arch: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_hyperv_exit *"], init: object = ..., /) -> kvm_hyperv_exit: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_interrupt *"], init: object = ..., /) -> kvm_interrupt: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_ioeventfd *"], init: object = ..., /) -> kvm_ioeventfd: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_irq_level *"], init: object = ..., /) -> kvm_irq_level: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_irq_routing *"], init: object = ..., /) -> kvm_irq_routing: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_irq_routing_entry *"], init: object = ..., /) -> kvm_irq_routing_entry: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_irq_routing_irqchip *"], init: object = ..., /) -> kvm_irq_routing_irqchip: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_irq_routing_msi *"], init: object = ..., /) -> kvm_irq_routing_msi: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_irqfd *"], init: object = ..., /) -> kvm_irqfd: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_lapic_state *"], init: object = ..., /) -> kvm_lapic_state: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_mp_state *"], init: object = ..., /) -> kvm_mp_state: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_msi *"], init: object = ..., /) -> kvm_msi: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_msr_entry *"], init: object = ..., /) -> kvm_msr_entry: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_msr_list *"], init: object = ..., /) -> kvm_msr_list: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_msrs *"], init: object = ..., /) -> kvm_msrs: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_pit_config *"], init: object = ..., /) -> kvm_pit_config: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_regs *"], init: object = ..., /) -> kvm_regs: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_run *"], init: object = ..., /) -> kvm_run: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_segment *"], init: object = ..., /) -> kvm_segment: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_signal_mask *"], init: object = ..., /) -> kvm_signal_mask: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_sregs *"], init: object = ..., /) -> kvm_sregs: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_sregs2 *"], init: object = ..., /) -> kvm_sregs2: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_stats_desc *"], init: object = ..., /) -> kvm_stats_desc: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_stats_header *"], init: object = ..., /) -> kvm_stats_header: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_sync_regs *"], init: object = ..., /) -> kvm_sync_regs: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_translation *"], init: object = ..., /) -> kvm_translation: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_userspace_memory_region *"], init: object = ..., /) -> kvm_userspace_memory_region: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_vcpu_events *"], init: object = ..., /) -> kvm_vcpu_events: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_xcr *"], init: object = ..., /) -> kvm_xcr: ...
    @overload
    def new(self, cdecl: Literal["struct kvm_xcrs *"], init: object = ..., /) -> kvm_xcrs: ...
    @overload
    def new(self, cdecl: str | CType, init: object = ..., /) -> Cdata: ...

ffi: Final[_Ffi]

KVMIO: Final[int] = 174
KVM_API_VERSION: Final[int] = 12
KVM_CAP_IRQCHIP: Final[int] = 0
KVM_CAP_USER_MEMORY: Final[int] = 3
KVM_CAP_SET_TSS_ADDR: Final[int] = 4
KVM_CAP_EXT_CPUID: Final[int] = 7
KVM_CAP_NR_VCPUS: Final[int] = 9
KVM_CAP_NR_MEMSLOTS: Final[int] = 10
KVM_CAP_MP_STATE: Final[int] = 14
KVM_CAP_SYNC_MMU: Final[int] = 16
KVM_CAP_DESTROY_MEMORY_REGION_WORKS: Final[int] = 21
KVM_CAP_USER_NMI: Final[int] = 22
KVM_CAP_SET_GUEST_DEBUG: Final[int] = 23
KVM_CAP_IRQ_ROUTING: Final[int] = 25
KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: Final[int] = 30
KVM_CAP_IRQFD: Final[int] = 32
KVM_CAP_PIT2: Final[int] = 33
KVM_CAP_IOEVENTFD: Final[int] = 36
KVM_CAP_SET_IDENTITY_MAP_ADDR: Final[int] = 37
KVM_CAP_ADJUST_CLOCK: Final[int] = 39
KVM_CAP_VCPU_EVENTS: Final[int] = 41
KVM_CAP_DEBUGREGS: Final[int] = 50
KVM_CAP_XSAVE: Final[int] = 55
KVM_CAP_XCRS: Final[int] = 56
KVM_CAP_TSC_CONTROL: Final[int] = 60
KVM_CAP_GET_TSC_KHZ: Final[int] = 61
KVM_CAP_MAX_VCPUS: Final[int] = 66
KVM_CAP_TSC_DEADLINE_TIMER: Final[int] = 72
KVM_CAP_SYNC_REGS: Final[int] = 74
KVM_CAP_KVMCLOCK_CTRL: Final[int] = 76
KVM_CAP_SIGNAL_MSI: Final[int] = 77
KVM_CAP_READONLY_MEM: Final[int] = 81
KVM_CAP_ENABLE_CAP_VM: Final[int] = 98
KVM_CAP_CHECK_EXTENSION_VM: Final[int] = 105
KVM_CAP_X86_SMM: Final[int] = 117
KVM_CAP_MULTI_ADDRESS_SPACE: Final[int] = 118
KVM_CAP_SPLIT_IRQCHIP: Final[int] = 121
KVM_CAP_MAX_VCPU_ID: Final[int] = 128
KVM_CAP_IMMEDIATE_EXIT: Final[int] = 136
KVM_CAP_X86_DISABLE_EXITS: Final[int] = 143
KVM_CAP_GET_MSR_FEATURES: Final[int] = 153
KVM_CAP_NESTED_STATE: Final[int] = 157
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: Final[int] = 168
KVM_CAP_X86_USER_SPACE_MSR: Final[int] = 188
KVM_CAP_X86_MSR_FILTER: Final[int] = 189
KVM_CAP_DIRTY_LOG_RING: Final[int] = 192
KVM_CAP_SREGS2: Final[int] = 200
KVM_CAP_EXIT_HYPERCALL: Final[int] = 201
KVM_CAP_BINARY_STATS_FD: Final[int] = 203
KVM_CAP_EXIT_ON_EMULATION_FAILURE: Final[int] = 204
KVM_CAP_VM_GPA_BITS: Final[int] = 207
KVM_CAP_XSAVE2: Final[int] = 208
KVM_CAP_SYSTEM_EVENT_DATA: Final[int] = 215
KVM_CAP_X86_TRIPLE_FAULT_EVENT: Final[int] = 218
KVM_EXIT_UNKNOWN: Final[int] = 0
KVM_EXIT_EXCEPTION: Final[int] = 1
KVM_EXIT_IO: Final[int] = 2
KVM_EXIT_HYPERCALL: Final[int] = 3
KVM_EXIT_DEBUG: Final[int] = 4
KVM_EXIT_HLT: Final[int] = 5
KVM_EXIT_MMIO: Final[int] = 6
KVM_EXIT_IRQ_WINDOW_OPEN: Final[int] = 7
KVM_EXIT_SHUTDOWN: Final[int] = 8
KVM_EXIT_FAIL_ENTRY: Final[int] = 9
KVM_EXIT_INTR: Final[int] = 10
KVM_EXIT_SET_TPR: Final[int] = 11
KVM_EXIT_TPR_ACCESS: Final[int] = 12
KVM_EXIT_NMI: Final[int] = 16
KVM_EXIT_INTERNAL_ERROR: Final[int] = 17
KVM_EXIT_SYSTEM_EVENT: Final[int] = 24
KVM_EXIT_IOAPIC_EOI: Final[int] = 26
KVM_EXIT_HYPERV: Final[int] = 27
KVM_EXIT_X86_RDMSR: Final[int] = 29
KVM_EXIT_X86_WRMSR: Final[int] = 30
KVM_EXIT_DIRTY_RING_FULL: Final[int] = 31
KVM_EXIT_AP_RESET_HOLD: Final[int] = 32
KVM_EXIT_X86_BUS_LOCK: Final[int] = 33
KVM_EXIT_XEN: Final[int] = 34
KVM_EXIT_NOTIFY: Final[int] = 37
KVM_EXIT_IO_IN: Final[int] = 0
KVM_EXIT_IO_OUT: Final[int] = 1
KVM_INTERNAL_ERROR_EMULATION: Final[int] = 1
KVM_INTERNAL_ERROR_SIMUL_EX: Final[int] = 2
KVM_INTERNAL_ERROR_DELIVERY_EV: Final[int] = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: Final[int] = 4
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: Final[int] = 1
KVM_SYSTEM_EVENT_SHUTDOWN: Final[int] = 1
KVM_SYSTEM_EVENT_RESET: Final[int] = 2
KVM_SYSTEM_EVENT_CRASH: Final[int] = 3
KVM_SYSTEM_EVENT_WAKEUP: Final[int] = 4
KVM_SYSTEM_EVENT_SUSPEND: Final[int] = 5
KVM_SYSTEM_EVENT_SEV_TERM: Final[int] = 6
KVM_MEM_LOG_DIRTY_PAGES: Final[int] = 1
KVM_MEM_READONLY: Final[int] = 2
KVM_SYNC_X86_REGS: Final[int] = 1
KVM_SYNC_X86_SREGS: Final[int] = 2
KVM_SYNC_X86_EVENTS: Final[int] = 4
KVM_CPUID_FLAG_SIGNIFCANT_INDEX: Final[int] = 1
KVM_CPUID_FLAG_STATEFUL_FUNC: Final[int] = 2
KVM_CPUID_FLAG_STATE_READ_NEXT: Final[int] = 4
KVM_APIC_REG_SIZE: Final[int] = 0x400
KVM_MAX_XCRS: Final[int] = 16
KVM_MP_STATE_RUNNABLE: Final[int] = 0
KVM_MP_STATE_UNINITIALIZED: Final[int] = 1
KVM_MP_STATE_INIT_RECEIVED: Final[int] = 2
KVM_MP_STATE_HALTED: Final[int] = 3
KVM_MP_STATE_SIPI_RECEIVED: Final[int] = 4
KVM_GUESTDBG_ENABLE: Final[int] = 1
KVM_GUESTDBG_SINGLESTEP: Final[int] = 2
KVM_GUESTDBG_USE_SW_BP: Final[int] = 0x10000
KVM_GUESTDBG_USE_HW_BP: Final[int] = 0x20000
KVM_IRQ_ROUTING_IRQCHIP: Final[int] = 1
KVM_IRQ_ROUTING_MSI: Final[int] = 2
KVM_IRQFD_FLAG_DEASSIGN: Final[int] = 1
KVM_IRQFD_FLAG_RESAMPLE: Final[int] = 2
KVM_IOEVENTFD_FLAG_DATAMATCH: Final[int] = 1
KVM_IOEVENTFD_FLAG_PIO: Final[int] = 2
KVM_IOEVENTFD_FLAG_DEASSIGN: Final[int] = 4
KVM_PIT_SPEAKER_DUMMY: Final[int] = 1
KVM_STATS_TYPE_SHIFT: Final[int] = 0
KVM_STATS_TYPE_MASK: Final[int] = 15
KVM_STATS_TYPE_CUMULATIVE: Final[int] = 0
KVM_STATS_TYPE_INSTANT: Final[int] = 1
KVM_STATS_TYPE_PEAK: Final[int] = 2
KVM_STATS_TYPE_LINEAR_HIST: Final[int] = 3
KVM_STATS_TYPE_LOG_HIST: Final[int] = 4
KVM_STATS_UNIT_SHIFT: Final[int] = 4
KVM_STATS_UNIT_MASK: Final[int] = 240
KVM_STATS_UNIT_NONE: Final[int] = 0
KVM_STATS_UNIT_BYTES: Final[int] = 16
KVM_STATS_UNIT_SECONDS: Final[int] = 32
KVM_STATS_UNIT_CYCLES: Final[int] = 48
KVM_STATS_UNIT_BOOLEAN: Final[int] = 64
KVM_STATS_BASE_SHIFT: Final[int] = 8
KVM_STATS_BASE_MASK: Final[int] = 0xf00
KVM_STATS_BASE_POW10: Final[int] = 0
KVM_STATS_BASE_POW2: Final[int] = 0x100
KVM_CPUID_FEATURES: Final[int] = 0x40000001
KVM_FEATURE_ASYNC_PF: Final[int] = 4
KVM_FEATURE_STEAL_TIME: Final[int] = 5
KVM_FEATURE_PV_EOI: Final[int] = 6
KVM_FEATURE_ASYNC_PF_VMEXIT: Final[int] = 10
KVM_FEATURE_ASYNC_PF_INT: Final[int] = 14
KVM_HC_MAP_GPA_RANGE: Final[int] = 12
KVM_ENOSYS: Final[int] = 0x3e8
KVM_MAP_GPA_RANGE_PAGE_SZ_4K: Final[int] = 0
KVM_MAP_GPA_RANGE_PAGE_SZ_2M: Final[int] = 1
KVM_MAP_GPA_RANGE_PAGE_SZ_1G: Final[int] = 2
KVM_MAP_GPA_RANGE_ENCRYPTED: Final[int] = 16
KVM_MAP_GPA_RANGE_DECRYPTED: Final[int] = 0
KVM_GET_API_VERSION: Final[int] = 0xae00
KVM_CREATE_VM: Final[int] = 0xae01
KVM_GET_MSR_INDEX_LIST: Final[int] = 0xc004ae02
KVM_CHECK_EXTENSION: Final[int] = 0xae03
KVM_GET_VCPU_MMAP_SIZE: Final[int] = 0xae04
KVM_GET_SUPPORTED_CPUID: Final[int] = 0xc008ae05
KVM_GET_EMULATED_CPUID: Final[int] = 0xc008ae09
KVM_GET_MSR_FEATURE_INDEX_LIST: Final[int] = 0xc004ae0a
KVM_CREATE_VCPU: Final[int] = 0xae41
KVM_GET_DIRTY_LOG: Final[int] = 0x4010ae42
KVM_SET_USER_MEMORY_REGION: Final[int] = 0x4020ae46
KVM_SET_TSS_ADDR: Final[int] = 0xae47
KVM_SET_IDENTITY_MAP_ADDR: Final[int] = 0x4008ae48
KVM_CREATE_IRQCHIP: Final[int] = 0xae60
KVM_IRQ_LINE: Final[int] = 0x4008ae61
KVM_SET_GSI_ROUTING: Final[int] = 0x4008ae6a
KVM_IRQFD: Final[int] = 0x4020ae76
KVM_CREATE_PIT2: Final[int] = 0x4040ae77
KVM_SET_BOOT_CPU_ID: Final[int] = 0xae78
KVM_IOEVENTFD: Final[int] = 0x4040ae79
KVM_SET_CLOCK: Final[int] = 0x4030ae7b
KVM_GET_CLOCK: Final[int] = 0x8030ae7c
KVM_SIGNAL_MSI: Final[int] = 0x4020aea5
KVM_MEMORY_ENCRYPT_OP: Final[int] = 0xc008aeba
KVM_MEMORY_ENCRYPT_REG_REGION: Final[int] = 0x8010aebb
KVM_MEMORY_ENCRYPT_UNREG_REGION: Final[int] = 0x8010aebc
KVM_CLEAR_DIRTY_LOG: Final[int] = 0xc018aec0
KVM_RUN: Final[int] = 0xae80
KVM_GET_REGS: Final[int] = 0x8090ae81
KVM_SET_REGS: Final[int] = 0x4090ae82
KVM_GET_SREGS: Final[int] = 0x8138ae83
KVM_SET_SREGS: Final[int] = 0x4138ae84
KVM_TRANSLATE: Final[int] = 0xc018ae85
KVM_INTERRUPT: Final[int] = 0x4004ae86
KVM_GET_MSRS: Final[int] = 0xc008ae88
KVM_SET_MSRS: Final[int] = 0x4008ae89
KVM_SET_SIGNAL_MASK: Final[int] = 0x4004ae8b
KVM_GET_FPU: Final[int] = 0x81a0ae8c
KVM_SET_FPU: Final[int] = 0x41a0ae8d
KVM_GET_LAPIC: Final[int] = 0x8400ae8e
KVM_SET_LAPIC: Final[int] = 0x4400ae8f
KVM_SET_CPUID2: Final[int] = 0x4008ae90
KVM_GET_CPUID2: Final[int] = 0xc008ae91
KVM_GET_MP_STATE: Final[int] = 0x8004ae98
KVM_SET_MP_STATE: Final[int] = 0x4004ae99
KVM_NMI: Final[int] = 0xae9a
KVM_SET_GUEST_DEBUG: Final[int] = 0x4048ae9b
KVM_GET_VCPU_EVENTS: Final[int] = 0x8040ae9f
KVM_SET_VCPU_EVENTS: Final[int] = 0x4040aea0
KVM_GET_DEBUGREGS: Final[int] = 0x8080aea1
KVM_SET_DEBUGREGS: Final[int] = 0x4080aea2
KVM_SET_TSC_KHZ: Final[int] = 0xaea2
KVM_GET_TSC_KHZ: Final[int] = 0xaea3
KVM_ENABLE_CAP: Final[int] = 0x4068aea3
KVM_GET_XCRS: Final[int] = 0x8188aea6
KVM_SET_XCRS: Final[int] = 0x4188aea7
KVM_KVMCLOCK_CTRL: Final[int] = 0xaead
KVM_GET_SREGS2: Final[int] = 0x8140aecc
KVM_SET_SREGS2: Final[int] = 0x4140aecd
KVM_GET_STATS_FD: Final[int] = 0xaece

REQUESTS: Final[dict[int, str]]

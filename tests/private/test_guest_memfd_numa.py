"""guest_memfd files that can be mapped, on a machine with two NUMA nodes: where pages are placed.

mbind(2) of a mapping sets the policy of the file, for whoever allocates a page by whatever means.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmpriv import Kvm
from kvmpriv.cdefs import guest_memfd as gm
from kvmpriv.cdefs import kvm as k
from kvmpriv.private import guest_memfd

from .support.mappings import GPA, OFFSET, MappedGuest, Mapping
from .support.processes import in_child
from .support.requirements import missing
from .support.rules import rule
from .support.syscalls import PAGE, address_of, answer, call

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmpriv import Vm

pytestmark = pytest.mark.usefixtures("no_leak", "guest_memfd_kvm")

#: Modes and flags of <linux/mempolicy.h>.
DEFAULT, PREFERRED, BIND, INTERLEAVE = range(4)
F_NODE, F_ADDR, MF_STRICT, MF_MOVE = 1, 2, 1, 2
BOTH = 0b11
PAGES = 8


@pytest.fixture
def placed(gm_vm: Vm, kvm: Kvm) -> Iterator[MappedGuest]:
    """A guest of 8 pages that the host has mapped, none of them allocated."""
    nodes = Path("/sys/devices/system/node/has_memory")
    if not nodes.exists() or nodes.read_text().strip() != "0-1":
        missing("numa", "there are no two nodes with memory (boot with numa=fake=2)")
    with ExitStack() as stack:
        yield MappedGuest(stack, gm_vm, kvm, pages=PAGES)


def bind(
    mapping: Mapping, mode: int, nodes: int, page: int = 0, pages: int = PAGES, flags: int = 0
) -> str:
    """The answer of mbind(2)."""
    address, mask = mapping.address + page * PAGE, k.ffi.new("__u64[1]", (nodes,))
    return answer(lambda: call("mbind", address, pages * PAGE, mode, address_of(mask), 64, flags))


def policy_of(mapping: Mapping, page: int = 0) -> tuple[int, int]:
    """The mode and the node mask of a page's policy, by get_mempolicy(2)."""
    mode, nodes = k.ffi.new("__s32 *"), k.ffi.new("__u64[1]")
    address = mapping.address + page * PAGE
    call("get_mempolicy", address_of(mode), address_of(nodes), 64, address, F_ADDR)
    return int(mode[0]), int(nodes[0])


def nodes_of(mapping: Mapping) -> list[int]:
    """The node of each page, which must be allocated, by get_mempolicy(2)."""
    found = []
    for at in range(0, mapping.size, PAGE):
        mapping.read(at, 1)
        node = k.ffi.new("__s32 *")
        call("get_mempolicy", address_of(node), 0, 0, mapping.address + at, F_NODE | F_ADDR)
        found.append(int(node[0]))
    return found


def allocate(placed: MappedGuest, how: str) -> None:
    """Have each page allocated, in order."""
    for at in range(0, placed.size, PAGE):
        if how == "host":
            placed.memory.write(at, b"x")
        elif how == "guest":
            placed.guest.store(GPA + at, 1, 0x78)
        elif how == "fallocate":
            placed.file.allocate(OFFSET + at, PAGE)
        else:
            assert guest_memfd.pre_fault_memory(placed.guest.vcpu, GPA + at, PAGE) == 0


@pytest.fixture(params=["host", "guest", "fallocate", "pre-fault"])
def how(request: pytest.FixtureRequest, gm_vm: Vm) -> str:
    """Each way to allocate a page."""
    if request.param == "pre-fault" and not gm_vm.check_extension(gm.KVM_CAP_PRE_FAULT_MEMORY):
        missing("pre-fault", "KVM_CAP_PRE_FAULT_MEMORY is 0")
    return str(request.param)


@rule("gm.numa.bind")
@pytest.mark.parametrize("node", [0, 1])
def test_bound_to_a_node(placed: MappedGuest, how: str, node: int) -> None:
    """After mbind(2) with MPOL_BIND every page is on that node, whoever allocates it."""
    assert bind(placed.memory, BIND, 1 << node) == "ok"
    allocate(placed, how)
    assert nodes_of(placed.memory) == [node] * PAGES
    placed.guest.fill(GPA, 0x5A, placed.size)
    assert placed.both_see(0, 0x5A, placed.size)


@rule("gm.numa.interleave")
def test_interleaved(placed: MappedGuest, how: str) -> None:
    """With MPOL_INTERLEAVE page after page is on the other node."""
    assert bind(placed.memory, INTERLEAVE, BOTH) == "ok"
    allocate(placed, how)
    nodes = nodes_of(placed.memory)
    assert nodes in ([0, 1] * (PAGES // 2), [1, 0] * (PAGES // 2))


@rule("gm.numa.range")
def test_a_policy_has_a_range(placed: MappedGuest, how: str) -> None:
    """mbind(2) of some pages is for those pages of the file and no others."""
    assert bind(placed.memory, BIND, 1 << 0) == "ok"
    assert bind(placed.memory, BIND, 1 << 1, 2, 3) == "ok"
    policies = [policy_of(placed.memory, page) for page in range(PAGES)]
    assert policies == [(BIND, 1)] * 2 + [(BIND, 2)] * 3 + [(BIND, 1)] * 3
    allocate(placed, how)
    assert nodes_of(placed.memory) == [0] * 2 + [1] * 3 + [0] * 3
    # A hole takes the page and not the policy.
    placed.punch_hole(2 * PAGE, 6 * PAGE)
    allocate(placed, how)
    assert nodes_of(placed.memory) == [0] * 2 + [1] * 3 + [0] * 3


@rule("gm.numa.inode")
def test_the_policy_is_the_files(placed: MappedGuest) -> None:
    """Another mapping has the same policy, in this process and in others, and a later one too."""
    assert policy_of(placed.memory) == (DEFAULT, 0)
    assert bind(placed.memory, BIND, 1 << 1, 0, 4) == "ok"
    for mapping in (placed.memory, placed.map()):
        assert policy_of(mapping, 3) == (BIND, 2)
        assert policy_of(mapping, 4) == (DEFAULT, 0)

    def child() -> tuple[tuple[int, int], str, list[int]]:
        with Mapping(placed.file.fileno(), placed.size, OFFSET) as own:
            seen = policy_of(own, 3)
            said = bind(own, BIND, 1 << 1, 4, 4)
            return seen, said, nodes_of(own)

    assert in_child(child) == ((BIND, 2), "ok", [1] * PAGES)
    placed.memory.close()
    placed.unbind()
    placed.memory = placed.map()
    assert policy_of(placed.memory, 4) == (BIND, 2)
    # The kernel compares with the policy of the mapping, which is still the default one here, and
    # then does nothing (mm/mempolicy.c, mbind_range); so this mapping sets one first.
    assert bind(placed.memory, BIND, 1 << 0) == "ok"
    assert bind(placed.memory, DEFAULT, 0) == "ok"
    assert policy_of(placed.memory, 4) == (DEFAULT, 0)


@rule("gm.numa.task")
@pytest.mark.parametrize("node", [0, 1])
def test_the_policy_of_the_task(placed: MappedGuest, node: int) -> None:
    """A page without a policy of the file is placed by the task's, and one with it is not."""

    def child() -> tuple[list[int], tuple[int, int]]:
        mask = k.ffi.new("__u64[1]", (1 << node,))
        call("set_mempolicy", BIND, address_of(mask), 64)
        allocate(placed, "host")
        return nodes_of(placed.memory), policy_of(placed.memory)

    assert bind(placed.memory, BIND, 1 << (1 - node), 4, 4) == "ok"
    # get_mempolicy(2) reports the file's policy, and that is none.
    assert in_child(child) == ([node] * 4 + [1 - node] * 4, (DEFAULT, 0))


@rule("gm.numa.move")
def test_allocated_pages_do_not_move(placed: MappedGuest) -> None:
    """mbind(2) with MPOL_MF_MOVE and move_pages(2) leave pages where they are, and their bytes.

    mbind(2) is EIO with MPOL_MF_STRICT.  The twin is anonymous memory, which moves.
    """
    assert bind(placed.memory, BIND, 1 << 0) == "ok"
    placed.guest.fill(GPA, 0x5A, placed.size)
    with Anonymous(placed.size) as other:
        assert bind(other, BIND, 1 << 0) == "ok"
        other.write(0, b"x" * other.size)
        for mapping, strict, there in ((other, "ok", 1), (placed.memory, "EIO", 0)):
            assert nodes_of(mapping) == [0] * PAGES
            said = bind(mapping, BIND, 1 << 1, flags=MF_MOVE | MF_STRICT)
            if mapping is other and said == "EIO":
                missing("numa-migration", "mbind(2) does not move anonymous memory")
            assert said == strict
            assert nodes_of(mapping) == [there] * PAGES
            assert bind(mapping, BIND, 1 << 1, flags=MF_MOVE) == "ok"
            assert nodes_of(mapping) == [there] * PAGES
    pages = k.ffi.new("__u64[]", [placed.memory.address + page * PAGE for page in range(PAGES)])
    targets, status = k.ffi.new("__s32[]", [1] * PAGES), k.ffi.new("__s32[]", PAGES)
    answer(
        lambda: call(
            "move_pages", 0, PAGES, address_of(pages), address_of(targets), address_of(status), 2
        )
    )
    assert nodes_of(placed.memory) == [0] * PAGES
    assert placed.both_see(0, 0x5A, placed.size)


class Anonymous(Mapping):
    """Anonymous memory, by the same methods."""

    def __init__(self, size: int) -> None:
        self.size = size
        map_private_anonymous = 0x22
        self.address = call("mmap", 0, size, 3, map_private_anonymous, -1, 0)

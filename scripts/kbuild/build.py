"""Build a kernel that has guest private memory, or find it in the cache.

NAME is `restrictedmem` (Debian's Linux 6.1 with the patch series of this folder: the v9
memfd_restricted ABI) or `guest_memfd` (Debian's Linux 6.12, unpatched, with software-protected
VMs).  The last line on stdout is the image's path; beside the image lie config, vmlinux,
System.map, the installed uapi headers (headers/include) and build.log.  As root on Debian what
is missing is installed with apt-get; elsewhere it is listed.

The cache is ~/.cache/kvmpriv/kernels ($XDG_CACHE_HOME honoured, $KVMPRIV_CACHE chooses another),
keyed by source version, patches, config, compiler and recipe.  $KVMPRIV_JOBS: parallel jobs;
$CC: the compiler.
"""

from __future__ import annotations

import errno
import signal
from pathlib import Path

from . import kernels
from .command import Parser
from .errors import Refused, Status, say
from .paths import cache_root
from .process import exit_on
from .recipe import Plan
from .store import find_or_build

EXIT_CODES = """exit codes:
  0  built or found
  2  bad usage, unknown NAME, or something is missing and cannot be installed here
  3  no source: no network, no package, not a Linux tree
  4  a patch does not apply (which, and which hunk)
  5  a config option that was asked for did not survive Kconfig
  6  compiling failed
  7  no space
  130, 143  interrupted, terminated

examples:
  build guest_memfd
  build restrictedmem --debug
  build restrictedmem --source ~/linux-6.1.y            # another tree, the same series
  build restrictedmem --config /boot/config-$(uname -r) --deb   # for real hardware"""


def tell_deb(entry: Path) -> None:
    release = (entry / "release").read_text().strip()
    packages = " ".join(
        str(p) for p in sorted(entry.glob("linux-image-*.deb")) if "dbg" not in p.name
    )
    say(
        f"To install and boot it:\n  sudo apt-get install {packages}\n"
        f"  sudo reboot    # choose Linux {release} under 'Advanced options' of the boot menu\n"
        f"  uname -r       # says {release}\n"
        "Built in but untried by us: the Intel (EPT) path; what we run has AMD's nested paging."
    )
    if entry.name.startswith("restrictedmem"):
        say(
            "The test vehicle (private memory for plain x86 guests) is on;\n"
            "kvm.private_mem_testing=0 on the kernel's command line turns it off."
        )


def parse(arguments: list[str]) -> Plan:
    parser = Parser("build", __doc__, EXIT_CODES)
    parser.add_argument("name", metavar="NAME", help=kernels.names("or"))
    parser.add_argument("--debug", action="store_true", help="with sanitizers and lock checking")
    parser.add_argument(
        "--literal", action="store_true", help="restrictedmem as posted: without fixes/*.patch"
    )
    parser.add_argument("--source", type=Path, metavar="TREE", help="a Linux tree or tarball")
    parser.add_argument("--config", type=Path, metavar="FILE", help="this config, completed")
    parser.add_argument("--deb", action="store_true", help="make installable packages as well")
    chosen = parser.parse_args(arguments)
    if problem := kernels.problem(chosen.name, chosen.literal):
        parser.error(problem)
    for path in (chosen.source, chosen.config):
        if path and not path.exists():
            parser.error(f"there is no {path}")
    return Plan(
        chosen.name,
        chosen.debug,
        chosen.literal,
        chosen.source and chosen.source.resolve(),
        chosen.config and chosen.config.resolve(),
        chosen.deb,
    )


def main(arguments: list[str]) -> int:
    exit_on(signal.SIGTERM)
    plan = parse(arguments)
    try:
        entry = find_or_build(plan)
    except Refused as refused:
        say(f"build: {refused}")
        return refused.code
    except OSError as error:
        if error.errno == errno.ENOSPC:
            say(f"build: no space left in {cache_root()}: {error.strerror}")
            return Status.SPACE
        say(f"build: {error}")
        return Status.FAILED
    except KeyboardInterrupt:
        say("build: interrupted; the next call starts afresh")
        return 130
    if plan.deb:
        tell_deb(entry)
    print(entry / "bzImage")
    return 0

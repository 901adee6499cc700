"""Build a kernel that has guest private memory, or find it in the cache.

NAME is `restrictedmem` (Debian's Linux 6.1 with the patches of scripts/kernel/restrictedmem: the
v9 memfd_restricted ABI), `guest_memfd` (Debian's newest Linux, from its backports, unpatched, with
software-protected VMs), `guest_memfd-6.12` (the same of Linux 6.12) or `guest_memfd-in-place`
(Linux 7.3 with the patches of scripts/kernel/in_place/abi).  The last line of stdout is the path of
the image.  Its folder also contains config, vmlinux, System.map, the installed uapi headers
(headers/include) and build.log.  As root on Debian, missing packages are installed with apt-get;
elsewhere they are listed.  Sources are downloaded into the cache; a newer Linux is looked
for once a day.

The cache is ~/.cache/kvmpriv/kernels; $XDG_CACHE_HOME and $KVMPRIV_CACHE change it.  A kernel is
built again when its source, patches, options, compiler, linker or the commands of the build change.
$KVMPRIV_JOBS is the number of parallel jobs, $CC the compiler.
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
  2  usage error, or packages are missing and cannot be installed here
  3  no source: no network, no package, or not a Linux tree
  4  a patch does not apply (the message names the hunk)
  5  Kconfig dropped an option that was asked for
  6  the compilation failed
  7  no space left
  130, 143  interrupted, terminated

examples:
  build guest_memfd
  build restrictedmem --debug
  build restrictedmem --source ~/linux-6.1.y            # another tree, the same series
  build restrictedmem --config /boot/config-$(uname -r) --deb   # for real hardware"""


def explain_packages(entry: Path) -> None:
    """Print how to install the packages of an entry, and how to boot the kernel."""
    release = (entry / "release").read_text().strip()
    packages = " ".join(
        str(p) for p in sorted(entry.glob("linux-image-*.deb")) if "dbg" not in p.name
    )
    say(
        f"To install and boot it:\n  sudo apt-get install {packages}\n"
        f"  sudo reboot    # choose Linux {release} under 'Advanced options' of the boot menu\n"
        f"  uname -r       # prints {release}\n"
        "The Intel (EPT) path is built in, but untried: our own tests run on AMD's nested paging."
    )
    if entry.name.startswith("restrictedmem"):
        say(
            "Plain x86 guests may use private memory, for tests;\n"
            "kvm.private_mem_testing=0 on the kernel's command line turns this off."
        )


def parse(arguments: list[str]) -> Plan:
    """The plan that the command line describes."""
    parser = Parser("build", __doc__, EXIT_CODES)
    parser.add_argument("name", metavar="NAME", help=kernels.names("or"))
    parser.add_argument("--debug", action="store_true", help="enable sanitizers and lock checking")
    parser.add_argument("--literal", action="store_true", help="v9 as posted, without the fixes")
    parser.add_argument("--source", type=Path, metavar="TREE", help="a Linux tree or tarball")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="use this config, with our options",
    )
    parser.add_argument("--deb", action="store_true", help="make Debian packages, too")
    chosen = parser.parse_args(arguments)
    if problem := kernels.problem(chosen.name, chosen.literal):
        parser.error(problem)
    for path in (chosen.source, chosen.config):
        if path and not path.exists():
            parser.error(f"{path} does not exist")
    return Plan(
        chosen.name,
        chosen.debug,
        chosen.literal,
        chosen.source and chosen.source.resolve(),
        chosen.config and chosen.config.resolve(),
        chosen.deb,
    )


def main(arguments: list[str]) -> int:
    """The command scripts/kernel/build."""
    exit_on(signal.SIGTERM)
    plan = parse(arguments)
    try:
        entry = find_or_build(plan, look=True)
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
        say("build: interrupted; the next call starts from the beginning")
        return 130
    if plan.deb:
        explain_packages(entry)
    print(entry / "bzImage")
    return 0

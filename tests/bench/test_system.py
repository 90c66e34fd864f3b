"""What is recorded of a computer: the fields an expert asks for, and nothing that names its owner."""

import json
import os
import platform
import sys
from dataclasses import replace

import pytest

from duo_mlx.bench.system import (
    SWITCHES,
    Conditions,
    Output,
    cautions,
    changes,
    conditions,
    run_command,
    system_record,
)

SECRETS = ("alice", "alices-macbook", "C02XK1SERIAL", "/Users/")
MAC = {
    "/usr/sbin/sysctl machdep": """machdep.cpu.brand_string: Apple M4 Max
hw.model: Mac16,5
hw.memsize: 137438953472
hw.physicalcpu: 16
hw.logicalcpu: 16
hw.perflevel0.physicalcpu: 12
hw.perflevel1.physicalcpu: 4
kern.hostname: alices-macbook.local
""",
    "/usr/sbin/sysctl -n": "total = 2048.00M  used = 320.50M  free = 1727.50M  (encrypted)\n",
    "/usr/bin/sw_vers": "ProductName:\t\tmacOS\nProductVersion:\t\t26.1\nBuildVersion:\t\t25B78\n",
    "/usr/bin/pmset -g batt": """Now drawing from 'AC Power'
 -InternalBattery-0 (id=C02XK1SERIAL)\t100%; charged; 0:00 remaining present: true
""",
    "/usr/bin/pmset -g": """System-wide power settings:
Currently in use:
 standby              1
 powermode            2
 lowpowermode         0
 sleep                1 (sleep prevented by alice, /Users/alice/bin/tool)
 hibernatefile        /var/vm/sleepimage
""",
    "/usr/bin/notifyutil -g": "com.apple.system.thermalpressurelevel 0\n",
}


def mac(command, limit):
    """A Mac's answers; each command is called by absolute path and has a limit."""
    assert command[0].startswith("/") and 0 < limit <= 5
    name = " ".join(command)
    for start in ("/usr/sbin/sysctl machdep", "/usr/sbin/sysctl -n", "/usr/bin/pmset -g batt", *MAC):
        if name.startswith(start):
            return Output(MAC[start])
    raise AssertionError(f"unexpected command {name}")


@pytest.fixture
def owner(monkeypatch, tmp_path):
    """An environment full of names, and a Linux tree with more of them."""
    for name in [name for name in os.environ if name.startswith(SWITCHES)]:
        monkeypatch.delenv(name)
    names = {"USER": "alice", "LOGNAME": "alice", "HOME": "/Users/alice", "HOSTNAME": "alices-macbook"}
    paths = {"DUO_MLX_CACHE": "/Users/alice/cache", "OPENBLAS_VERBOSE": "alice", "MLX_METAL_PATH": "/Users/alice/metal"}
    for name, value in (names | paths | {"OPENBLAS_NUM_THREADS": "2", "MLX_METAL_FAST_SYNCH": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platform, "node", lambda: "alices-macbook")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-45-alices-macbook")
    files = {
        "proc/cpuinfo": "".join(
            f"processor\t: {n}\nmodel name\t: AMD Ryzen 9 7950X\nphysical id\t: 0\ncore id\t\t: {n // 2}\n"
            "Serial\t\t: C02XK1SERIAL\n\n"
            for n in range(4)
        ),
        "proc/meminfo": "MemTotal: 65536 kB\nSwapTotal: 2048 kB\nSwapFree: 1024 kB\nHugePages_Total: 0\n",
        "proc/sys/kernel/hostname": "alices-macbook\n",
        "etc/os-release": 'NAME="Debian GNU/Linux"\nID=debian\nVERSION_ID="12"\nHOME_URL="https://alice/"\n',
        "sys/class/power_supply/AC/type": "Mains\n",
        "sys/class/power_supply/AC/online": "1\n",
        "sys/class/power_supply/BAT0/type": "Battery\n",
        "sys/class/power_supply/BAT0/status": "Charging\n",
        "sys/class/power_supply/BAT0/serial_number": "C02XK1SERIAL\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.fixture
def on_mac(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")


@pytest.fixture
def on_linux(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")


@pytest.mark.usefixtures("on_mac", "owner")
def test_a_macs_record():
    record = json.loads(json.dumps(system_record(mac)))
    assert record["chip"] == "Apple M4 Max" and record["model"] == "Mac16,5" and record["memory_bytes"] == 128 << 30
    assert record["cores"] == {"physical": 16, "logical": 16, "performance": 12, "efficiency": 4}
    assert record["os"] == {"name": "macOS", "version": "26.1", "build": "25B78"}
    assert (record["thermal_level"], record["power_source"]) == (0, "AC Power")
    assert record["power_mode"] == {"powermode": 2, "lowpowermode": 0}
    assert record["swap_used_bytes"] == int(320.5 * (1 << 20))
    assert record["environment"] == {
        "DUO_MLX_CACHE": "(set)",
        "MLX_METAL_FAST_SYNCH": "1",
        "MLX_METAL_PATH": "(set)",
        "OPENBLAS_NUM_THREADS": "2",
        "OPENBLAS_VERBOSE": "(set)",
    }
    assert record["versions"]["python"] == platform.python_version() and record["versions"]["mlx"]
    assert "zeus-apple-silicon" in record["versions"] and "blas" in record


@pytest.mark.usefixtures("on_linux")
def test_a_linux_record(owner):
    record = system_record(root=owner)
    assert record["chip"] == "AMD Ryzen 9 7950X" and record["memory_bytes"] == 64 << 20
    assert record["cores"]["physical"] == 2 and record["os"] == {"name": "debian", "version": "12", "build": "6.8.0"}
    assert (record["power_source"], record["swap_used_bytes"]) == ("AC Power", 1 << 20)
    (owner / "sys/class/power_supply/AC/online").write_text("0\n")
    (owner / "sys/class/power_supply/BAT0/status").write_text("Discharging\n")
    assert conditions(root=owner).power_source == "Battery Power"


@pytest.mark.parametrize("kind", ["on_mac", "on_linux"])
def test_no_name_or_serial_number_is_in_it(request, owner, kind):
    request.getfixturevalue(kind)
    written = json.dumps(system_record(mac, owner)).lower()
    assert len(written) > 500
    for secret in SECRETS:
        assert secret.lower() not in written


@pytest.mark.parametrize(
    "answer", [Output(failed="no answer in 5 s"), Output("gibberish: :\n1\n\0"), Output("used = 1..5M")]
)
@pytest.mark.usefixtures("on_mac")
def test_what_does_not_answer_is_null(answer):
    record = system_record(lambda _command, _limit: answer)
    assert {record[key] for key in ("chip", "model", "memory_bytes", "thermal_level", "power_source")} == {None}
    assert set(record["cores"].values()) | set(record["os"].values()) == {None} and record["swap_used_bytes"] is None
    assert record["power_mode"] == {} and record["versions"]["python"]


@pytest.mark.usefixtures("on_linux")
def test_an_empty_linux_is_null_too(tmp_path):
    record = system_record(root=tmp_path)
    assert (record["chip"], record["memory_bytes"], record["power_source"], record["swap_used_bytes"]) == (None,) * 4


def test_commands_are_limited_and_their_failures_are_words():
    python = sys.executable
    assert run_command([python, "-c", "print('é')"]).text.strip() in ("é", "\\xe9")
    assert run_command(["/nowhere/notifyutil"]) == Output(failed="No such file or directory")
    assert run_command([python, "-c", "import time; time.sleep(30)"], 0.2) == Output(failed="no answer in 0.2 s")
    assert run_command([python, "-c", "import os; os.abort()"]).failed == "killed by signal 6"
    assert run_command([python, "-c", "import sys; print(1); sys.exit('a\\nb')"]) == Output("1\n", "b")
    assert run_command([python, "-c", "import sys; sys.exit(3)"]).failed == "exit code 3"


def test_commands_run_in_the_c_locale(monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert run_command([sys.executable, "-c", "import os; print(os.environ['LC_ALL'])"]).text == "C\n"
    assert os.environ["LC_ALL"] == "de_DE.UTF-8"


CALM = Conditions(0, "AC Power", {"powermode": 0}, (0.5, 0.5, 0.5), 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"thermal_level": 1}, "the thermal pressure changed from 0 to 1"),
        ({"power_source": "Battery Power"}, "the power source changed from AC Power to Battery Power"),
        ({"power_mode": {"powermode": 1}}, "the power mode changed"),
    ],
)
def test_a_change_makes_a_run_invalid_and_says_why(change, says):
    (reason,) = changes(CALM, replace(CALM, **change))
    assert says in reason
    assert changes(replace(CALM, **change), CALM) != []  # either way


def test_load_and_what_is_unknown_make_nothing_invalid():
    assert changes(CALM, replace(CALM, load_average=(9.0, 2.0, 1.0), swap_used_bytes=1)) == []
    assert changes(CALM, replace(CALM, thermal_level=None, power_source=None, power_mode={})) == []


def test_what_speaks_against_measuring_now():
    assert cautions(CALM, cpus=8) == []
    hot = Conditions(2, "Battery Power", {"lowpowermode": 1}, (6.0, 1.0, 1.0), None)
    assert [caution.split()[0] for caution in cautions(hot, cpus=8)] == ["thermal", "it", "low", "load"]
    assert cautions(Conditions(None, None, {}, (0.0, 0.0, 0.0), None), cpus=8) == []


@pytest.mark.usefixtures("on_mac")
def test_conditions_take_the_load_when_asked():
    assert conditions(mac, load=lambda: (1.0, 2.0, 3.0)).load_average == (1.0, 2.0, 3.0)

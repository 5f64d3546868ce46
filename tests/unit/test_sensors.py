"""What a node's sensors say, read where Linux has them."""

from __future__ import annotations

from pathlib import Path

from fedtide.edge_agent.tasks import sensors


def test_temperature_and_battery_are_read_where_linux_has_them(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    assert sensors.hottest_celsius(tmp_path) is None
    assert sensors.battery(tmp_path) is None
    write("thermal_zone0/temp", "41000")
    write("thermal_zone1/temp", "55500")
    write("BAT0/type", "Battery")
    write("BAT0/capacity", "37")
    write("BAT0/status", "Discharging")
    write("AC/type", "Mains")
    assert sensors.hottest_celsius(tmp_path) == 55.5
    assert sensors.battery(tmp_path) == sensors.Battery(0.37, False)
    write("BAT0/status", "Charging")
    assert sensors.battery(tmp_path) == sensors.Battery(0.37, True)

"""Slow data, slow hardware and heavy packs are told apart."""

from dataclasses import replace

from megavlm.monitor.stragglers import RankTimes, judge

USUAL = RankTimes("host", planned_flops=1e12, data_wait_s=0.1, compute_s=5.0, probe_s=0.01)


def verdicts(**odd):
    ranks = [USUAL, USUAL, replace(USUAL, **odd), USUAL]
    table, remarks = judge(ranks, seconds=10.0)
    assert len(table) == 5
    return remarks


def test_all_alike():
    assert verdicts() == []


def test_slow_data():
    assert verdicts(data_wait_s=3.0) == ["rank 2 on host: slow data"]


def test_slow_hardware_by_its_work_and_by_the_probe():
    assert verdicts(compute_s=8.0) == ["rank 2 on host: slow hardware"]
    assert verdicts(probe_s=0.02) == ["rank 2 on host: slow hardware"]


def test_more_work_is_not_slow_hardware():
    assert verdicts(planned_flops=1.5e12, compute_s=7.5) == ["rank 2 on host: heavy packs"]


def test_where_compute_cannot_be_measured_the_probe_decides():
    ranks = [replace(USUAL, compute_s=0.0, probe_s=0.01 * (1 + (i == 1))) for i in range(4)]
    assert judge(ranks, 10.0)[1] == ["rank 1 on host: slow hardware"]

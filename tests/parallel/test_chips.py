"""Peaks are those of one jax device."""

from tpu_llm.parallel.chips import peak_flops


def test_a_device_has_its_share_of_its_chips_peak():
    assert peak_flops('TPU v5 lite') == 197e12
    assert peak_flops('TPU7x') == 2307e12 / 2


def test_what_is_not_in_the_table_has_no_peak():
    assert peak_flops('cpu') is None

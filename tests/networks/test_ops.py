"""Operations of the networks where only long, narrow or mixed inputs show a mistake."""

from __future__ import annotations

import numpy as np
from support.networks import mlx_only

from zimage_ref.networks.ops import attention


def test_attention_of_more_rows_than_a_chunk_is_that_of_each_row_alone() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, rows, 8)).astype(np.float32) for rows in (1030, 19, 19))
    mask = rng.random((1, 1, 1030, 19)) < 0.7
    mask[..., 0] = True
    rows = [attention(q[:, :, [i]], k, v, mask[:, :, [i]]) for i in (0, 511, 512, 1023, 1024, 1029)]
    np.testing.assert_allclose(attention(q, k, v, mask)[:, :, [0, 511, 512, 1023, 1024, 1029]],
                               np.concatenate(rows, axis=2), atol=1e-6)  # fmt: skip


@mlx_only
def test_two_columns_hold_a_sum_to_twice_the_digits_of_bfloat16() -> None:
    import mlx.core as mx

    from zimage_mlx.networks.ops import _widened

    mx.random.seed(0)
    d_out, out, v = (mx.random.normal((1, 1, 64, 16)).astype(mx.bfloat16) for _ in range(3))
    d_wide, v_wide_t = _widened(d_out, out, v)
    sums = np.array(-(d_out.astype(mx.float32) * out.astype(mx.float32)).sum(-1))
    columns = np.array(d_wide[..., 16:].astype(mx.float32))
    np.testing.assert_allclose(columns.sum(-1), sums, rtol=2**-14, atol=2**-14)
    assert v_wide_t.shape == (1, 1, 24, 64)


@mlx_only
def test_layers_of_other_bits_have_programs_of_their_own() -> None:
    import mlx.core as mx
    import mlx.nn as nn

    from zimage_mlx.networks.compiled import PerBlock

    run = PerBlock(lambda layer, x: layer(x))
    x = {bits: mx.random.normal((3, columns)) for bits, columns in ((4, 128), (8, 64))}  # their packed shapes are equal
    layers = {bits: nn.QuantizedLinear(x[bits].shape[1], 32, False, 16 * 8 // bits * 2, bits) for bits in x}
    for bits in (4, 8, 4, 8):
        np.testing.assert_allclose(np.array(run(layers[bits], x[bits])), np.array(layers[bits](x[bits])), atol=1e-5)
    assert run.programs == 2

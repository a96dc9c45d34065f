"""The CvT: overlapping patches, convolutional projections, a class token in the last stage, no positions."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvit.layers.patch_embedding import Patches
from mmvit.towers.cvt import ConvolutionalAttention, ConvolutionalEmbedding, CvT, CvTConfig, as_map, as_tokens

NARROW: dict[str, Any] = {"widths": [8, 12, 16], "depths": [1, 2, 3], "num_heads": [1, 3, 4]}


def tower(**changes: Any) -> CvT:
    """Return a CvT of the default config with `changes`, and norms different from 1 and 0."""
    torch.manual_seed(0)
    config = dataclasses.asdict(CvTConfig(**NARROW)) | changes
    model = CvT(**{name: value for name, value in config.items() if name not in ("kind", "image_size")})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def seen(model: CvT, images: Tensor, ending: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return inputs and outputs of the modules with this name suffix for the images."""
    calls = {}
    for name, module in model.named_modules():
        if name.endswith(ending):
            module.register_forward_hook(lambda _, x, y, name=name: calls.update({name: (x[0], y)}))
    with torch.no_grad():
        model(images)
    return calls


def test_c1_convolutional_token_embedding():
    """224 -> 56 -> 28 -> 14; a convolution, then LayerNorm over channels; floor((H + 2p - k) / s) + 1."""
    calls = seen(tower(), torch.randn(1, 3, 224, 224), ".embed")
    assert [tuple(y.shape) for _, y in calls.values()] == [(1, 8, 56, 56), (1, 12, 28, 28), (1, 16, 14, 14)]
    model = tower()
    for stage, (kernel, stride, padding) in zip(model.stages, [(7, 4, 2), (3, 2, 1), (3, 2, 1)], strict=True):
        convolution = stage.embed.projection
        maps = torch.randn(2, convolution.in_channels, 19, 30)
        expected = F.conv2d(maps, convolution.weight, convolution.bias, stride, padding)
        mean, variance = expected.mean(dim=1, keepdim=True), expected.var(dim=1, keepdim=True, correction=0)
        gain, bias = (p[:, None, None] for p in (stage.embed.norm.weight, stage.embed.norm.bias))
        expected = (expected - mean) * (variance + 1e-5).rsqrt() * gain + bias
        sides = tuple((side + 2 * padding - kernel) // stride + 1 for side in (19, 30))
        assert expected.shape[2:] == sides
        assert (stage.embed(maps) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("patch_size", "stride"), [(7, 4), (7, 2), (4, 4), (3, 2), (3, 1), (5, 3), (2, 2)])
def test_sides_of_n_strides_become_n_tokens(patch_size: int, stride: int):
    embed = ConvolutionalEmbedding(3, 4, patch_size=patch_size, stride=stride, norm_eps=1e-5)
    for n in (1, 2, 7):
        assert embed(torch.zeros(1, 3, n * stride, 2 * n * stride)).shape == (1, 4, n, 2 * n)


def test_c2_convolutional_projection():
    """Depthwise 3x3 -> BatchNorm -> linear is a 1x1 convolution after them; the class token goes to linear alone."""
    attention = tower().stages[2].blocks[0].attention
    x = torch.randn(2, 1 + 5 * 6, 16)
    for name, stride, rows, columns in [("q", 1, 5, 6), ("k", 2, 3, 3), ("v", 2, 3, 3)]:
        (convolution, norm), linear = attention.get_submodule(f"{name}_neighbours"), attention.get_submodule(name)
        assert convolution.bias is None
        maps = x[:, 1:].transpose(1, 2).reshape(2, 16, 5, 6)
        maps = F.conv2d(maps, convolution.weight, None, stride, 1, groups=16)
        gain = norm.weight * (norm.running_var + 1e-5).rsqrt()
        maps = (maps - norm.running_mean[:, None, None]) * gain[:, None, None] + norm.bias[:, None, None]
        maps = F.conv2d(maps, linear.weight[:, :, None, None], linear.bias)
        assert maps.shape[2:] == (rows, columns)
        expected = torch.cat([linear(x[:, :1]), maps.flatten(2).transpose(1, 2)], dim=1)
        got = []
        handle = linear.register_forward_hook(lambda _, __, y, got=got: got.append(y))
        attention(x, (5, 6))
        handle.remove()
        assert (got[0] - expected).abs().max() <= 1e-5


def test_c2_a_quarter_of_the_keys_and_values():
    """At 224 px: 3136 and 784, 784 and 196, then with the class token 197 and 50."""
    images = torch.randn(1, 3, 224, 224)
    model = tower(depths=[1, 1, 1])
    counts = {
        letter: [x.shape[1] for x, _ in seen(model, images, f"attention.{letter}").values()]
        for letter in ("q", "k", "v")
    }
    assert counts == {"q": [3136, 784, 197], "k": [784, 196, 50], "v": [784, 196, 50]}


def test_c2_the_class_token_bypasses_the_convolutions():
    attention = tower().stages[2].blocks[0].attention
    x, other = torch.randn(2, 1 + 16, 16), torch.randn(2, 1, 16)
    changed = torch.cat([other, x[:, 1:]], dim=1)
    for name in ("q", "k", "v"):
        maps = []
        handle = attention.get_submodule(f"{name}_neighbours").register_forward_hook(
            lambda _, __, y, maps=maps: maps.append(y)
        )
        attention(x, (4, 4))
        attention(changed, (4, 4))
        handle.remove()
        assert torch.equal(maps[0], maps[1])
    assert not torch.allclose(attention(x, (4, 4)), attention(changed, (4, 4)))  # but not attention


@pytest.mark.parametrize(("width", "num_heads"), [(8, 1), (12, 3), (16, 4)])
def test_c3_attention_scale(width: int, num_heads: int):
    """Scores are divided by sqrt(d_model); with several heads sqrt(d_h) would change the result."""
    torch.manual_seed(0)
    attention = ConvolutionalAttention(width, num_heads).eval()
    x = 3 * torch.randn(2, 16, width)
    maps = as_map(x, (4, 4))
    q = attention.q(as_tokens(attention.q_neighbours(maps))).unflatten(2, (num_heads, -1))
    k = attention.k(as_tokens(attention.k_neighbours(maps))).unflatten(2, (num_heads, -1))
    v = attention.v(as_tokens(attention.v_neighbours(maps))).unflatten(2, (num_heads, -1))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k)

    def attend(scale: float) -> Tensor:
        return attention.out(torch.einsum("bhnm,bmhd->bnhd", (scores * scale).softmax(dim=-1), v).flatten(2))

    assert (attention(x, (4, 4)) - attend(width**-0.5)).abs().max() <= 1e-6
    wrong = (attention(x, (4, 4)) - attend((width // num_heads) ** -0.5)).abs().max()
    assert (wrong > 1e-4) == (num_heads > 1)


def test_c4_no_positions_class_token_in_the_last_stage_three_stages():
    """Widths 64/192/384, heads 1/3/6, depths 1-2-10; one set of weights for 224 and 384 px."""
    config = CvTConfig()
    assert (config.widths, config.num_heads, config.depths) == ([64, 192, 384], [1, 3, 6], [1, 2, 10])
    assert config.stride == 16
    model = tower()
    assert [stage.class_token is not None for stage in model.stages] == [False, False, True]
    assert [len(stage.blocks) for stage in model.stages] == [1, 2, 3]
    assert [name for name in model.state_dict() if "pos" in name] == []
    for side, rows in ((224, 14), (384, 24)):
        output = model(torch.randn(1, 3, side, side))
        assert output.tokens.shape == (1, 1 + rows * rows, 16)
        assert output.pooled.shape == (1, 16)


def test_pooled_is_the_normalised_class_token():
    model = tower()
    tokens = {}
    model.norm.register_forward_hook(lambda _, x, y: tokens.update(x=x[0], y=y))
    output = model(torch.randn(2, 3, 32, 48))
    assert output.tokens.shape == (2, 1 + 2 * 3, 16)
    assert torch.equal(output.tokens, tokens["y"])
    assert torch.equal(output.pooled, F.layer_norm(tokens["x"][:, 0], (16,), model.norm.weight, model.norm.bias))


def test_rows_and_columns_are_not_swapped():
    """The transposed image with transposed kernels gives the same."""
    model, turned, images = tower(), tower(), torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        for module in turned.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(module.weight.transpose(2, 3).clone())
        assert (model(images).pooled - turned(images.transpose(2, 3)).pooled).abs().max() <= 1e-5
        assert (model(images).pooled - model(images.transpose(2, 3)).pooled).abs().max() > 1e-3


def test_half_precision_weights_take_float_images():
    model, images = tower(), torch.randn(2, 3, 32, 32)
    expected, got = model(images).pooled, model.bfloat16()(images).pooled
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().max() <= 0.05 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert (tower()(images).pooled - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("side", [16, 17, 33, 50])
def test_any_larger_side_is_taken(side: int):
    rows = side
    for kernel, stride, padding in [(7, 4, 2), (3, 2, 1), (3, 2, 1)]:
        rows = (rows + 2 * padding - kernel) // stride + 1
    assert tower()(torch.randn(2, 3, side, 16)).tokens.shape == (2, 1 + rows, 16)


@pytest.mark.parametrize("training", [True, False])
def test_every_parameter_gets_a_gradient(training: bool):
    model = tower(drop_path=0.1).train(training)
    # What the last block's queries see of their neighbourhood matters for other tokens than the class token.
    model(torch.randn(4, 3, 32, 32)).tokens.pow(3).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_drop_path_rises_in_the_last_stage_alone():
    model = tower(depths=[2, 2, 3], drop_path=0.3)
    rates = [[block.drop_path.rate for block in stage.blocks] for stage in model.stages]
    assert rates == [[0, 0], [0, 0], pytest.approx([0, 0.15, 0.3])]
    images = torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(images).pooled, model(images).pooled)
        model.train()
        assert not torch.allclose(model(images).pooled, model(images).pooled, atol=1e-3)


def test_both_branches_of_a_block_are_dropped():
    block = tower().stages[2].blocks[0]
    block.drop_path.forward = lambda x, branch: torch.zeros_like(x)
    x = torch.randn(2, 1 + 16, 16)
    assert torch.equal(block(x, (4, 4)), x)


def test_one_block_in_the_last_stage_is_never_dropped():
    assert [block.drop_path.rate for block in tower(depths=[1, 1, 1], drop_path=0.3).stages[2].blocks] == [0]


def test_an_image_depends_on_its_batch_in_training_mode_alone():
    model, images = tower(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert (model(images).pooled[:2] - model(images[:2]).pooled).abs().max() <= 1e-6
        model.train()
        assert (model(images).pooled[:2] - model(images[:2]).pooled).abs().max() > 1e-3


def test_batch_norm_can_be_frozen_while_the_rest_trains():
    model, images = tower().train(), torch.randn(4, 3, 32, 32)
    norms = [module.eval() for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    output = model(images).pooled
    assert (output[:2] - model(images[:2]).pooled).abs().max() <= 1e-6
    assert all(torch.equal(mean, norm.running_mean) for mean, norm in zip(before, norms, strict=True))
    output.sum().backward()
    assert all(norm.weight.grad is not None for norm in norms)


def test_batch_norm_becomes_synchronised_under_the_same_names():
    model, images = tower(), torch.randn(2, 3, 32, 32)
    names, expected = list(model.state_dict()), model(images).pooled
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in shared.modules()) == 3 * (1 + 2 + 3)
    assert list(shared.state_dict()) == names
    assert torch.equal(shared(images).pooled, expected)


def test_the_epsilon_is_that_of_every_layer_norm():
    norms = [module for module in tower(norm_eps=1e-3).modules() if isinstance(module, nn.LayerNorm | nn.BatchNorm2d)]
    assert {(type(norm), norm.eps) for norm in norms} == {(nn.LayerNorm, 1e-3), (nn.BatchNorm2d, 1e-5)}


def test_initial_values():
    torch.manual_seed(0)
    model = CvT(
        *NARROW.values(),
        **{name: getattr(CvTConfig(), name) for name in ("patch_sizes", "strides", "mlp_ratio", "activation")},
        **{name: getattr(CvTConfig(), name) for name in ("norm_eps", "qkv_bias", "drop_path")},
    )
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    assert 0.019 < weights.std() < 0.021
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, nn.Linear))
    assert model.stages[2].class_token.any()
    assert model.stages[2].class_token.abs().max() < 0.1


def test_small_images_take_small_strides_and_few_stages():
    config = CvTConfig(image_size=16, strides=[2, 2], patch_sizes=[3, 3], widths=[8, 16], num_heads=[1, 2])
    assert config.stride == 4
    model = tower(strides=[2, 2], patch_sizes=[3, 3], widths=[8, 16], num_heads=[1, 2], depths=[1, 1])
    assert model(torch.randn(1, 3, 16, 16)).tokens.shape == (1, 17, 16)
    assert model.stride == 4


def test_query_key_and_value_without_biases():
    names = list(tower(qkv_bias=False).state_dict())
    assert [name for name in names if name.endswith(("attention.q.bias", "attention.k.bias", "attention.v.bias"))] == []
    assert "stages.0.blocks.0.attention.out.bias" in names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": [1, 2]}, r"one number per stage in each list: widths \[8, 12, 16\], depths \[1, 2\]"),
        ({name: [] for name in ("widths", "depths", "num_heads", "patch_sizes", "strides")}, "one number per stage"),
        ({"num_heads": [1, 5, 4]}, "width 12 is not divisible by num_heads 5"),
        ({"strides": [8, 2, 2]}, "stride 8 must be between 1 and patch_size 7"),
        ({"strides": [4, 2, 0]}, "stride 0 must be between 1 and patch_size 3"),
        ({"activation": "relu6"}, "activation 'relu6' is unknown"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tower(**changes)


@pytest.mark.parametrize("shape", [(15, 32), (32, 8), (1, 1)])
def test_an_image_that_is_too_small_is_refused(shape: tuple[int, int]):
    message = f"an image of {shape[0]}x{shape[1]} px is too small for this tower; use sides of 16 px or more"
    with pytest.raises(ValueError, match=message):
        tower()(torch.zeros(1, 3, *shape))


def test_patches_are_refused():
    with pytest.raises(ValueError, match="needs whole images"):
        tower()(torch.zeros(1, 3, 32, 32), torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="needs whole images"):
        tower()(Patches(torch.zeros(1, 4, 48), torch.tensor([[2, 2]])))

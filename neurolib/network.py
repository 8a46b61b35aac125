"""The segmentation network: timm's vision transformer behind an inflated patch embedding.

    block (B, 1, 5, 100, 100)
      → resized in-plane to the scale the encoder knows (100 → 224)
      → D slices in, one plane of tokens out  (inflated patch embedding)
      → transformer blocks, unchanged; tokens after 4 of them
      → pyramid of 4 scales, pooled and fused (UPerNet-style decoder, GroupNorm)
      → logits of the centre slice (B, 1, 100, 100), or of all five (B, 5, 100, 100)

Two additions are ours, not the paper's, and results that use them say so. `stem=True` adds a
small U-Net at full resolution: a token of 14 pixels at this scale is 6 voxels wide, a neurite 2 to
4. `contrast=True` shows the encoder local contrast instead of brightness, and the stem both.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from neurolib._timm import timm
from neurolib.errors import NeurolibWarning, SettingsError
from neurolib.inflation import LoadReport, inflate_encoder
from neurolib.parameters import check_range
from neurolib.weights import load_pretrained

# The U-Net for comparison: its name, given in place of an encoder's, and its layout.
UNET = "monai_unet"
CHANNELS = (32, 64, 128, 256)
# Rows and columns are pooled three times, the few slices of a block never.
STRIDES = ((1, 2, 2),) * 3
# Neurites fill about one voxel in a hundred of a salient block; networks start near that share.
EMPTY_LOGIT = -4.0

# Pre-trained encoders that the course was made for; any other plain ViT in timm may work as well.
# OpenAI's CLIP was trained with QuickGELU. timm also offers its weights under a name without
# QuickGELU, but that network computes something else.
ENCODERS = (
    "vit_small_patch16_224.dino",
    "vit_small_patch8_224.dino",
    "vit_base_patch16_224.dino",
    "vit_base_patch8_224.dino",
    "vit_small_patch14_dinov2.lvd142m",
    "vit_base_patch14_dinov2.lvd142m",
    "vit_small_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_small_patch16_dinov3.lvd1689m",
    "vit_base_patch16_dinov3.lvd1689m",
    "vit_base_patch16_224.mae",
    "vit_base_patch16_clip_quickgelu_224.openai",
    "vit_base_patch16_clip_224.laion2b",
    "vit_small_patch16_224.augreg_in21k",
    "vit_base_patch16_224.augreg_in21k",
)


@dataclass(frozen=True)
class NetworkSettings:
    """Settings that determine the shape of the network; each checkpoint holds them."""

    encoder: str = "vit_small_patch14_dinov2.lvd142m"
    depth: int = 5  # slices of a block
    block: int = 100  # rows and columns of a block
    size: int = 224  # rows and columns that the encoder sees
    predict: str = "center"
    stem: bool = False
    width: int = 64  # channels of the decoder
    contrast: bool = False  # local contrast in place of brightness

    def __post_init__(self):
        for name, value in asdict(self).items():
            check_range(name, value)
        if self.predict not in ("center", "all"):
            raise SettingsError(f"predict={self.predict!r}: expected 'center' or 'all'")
        if self.depth % 2 == 0:
            raise SettingsError(f"depth={self.depth}: expected an odd number of slices")
        if self.width < 32 or self.width % 32:
            raise SettingsError(f"width={self.width}: expected a multiple of 32 channels")
        if self.encoder == UNET:
            if self.stem or self.contrast:
                raise SettingsError("stem, contrast: expected False for the U-Net")
            return
        if not timm.is_model(self.encoder.split(".")[0]):
            raise SettingsError(f"encoder={self.encoder!r}: timm has no such model")
        try:
            timm.get_pretrained_cfg(self.encoder)
        except RuntimeError as error:
            raise SettingsError(f"encoder={self.encoder!r}: {error}") from None


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution, GroupNorm over groups of 8 channels, GELU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(max(1, outputs // 8), outputs),
        nn.GELU(),
    )


def resize_to(maps: torch.Tensor, size: Sequence[int], mode: str = "bilinear") -> torch.Tensor:
    """Resize (B, C, h, w) to `size`, rows and columns, at least one of each."""
    size = [max(1, int(side)) for side in size]
    return F.interpolate(maps, size, mode=mode, align_corners=False)


class Segmenter(nn.Module):
    """A vision transformer encoder with a light pyramid decoder.

    Input (B, 1, D, h, w), values in [0, 1]; h and w need not be `block`: larger tiles are resized
    by the same factor, to the nearest multiple of the patch. Output: logits (B, 1, h, w) for
    ``predict="center"``, (B, D, h, w) for ``"all"``. ``depth=1`` is the 2D network.
    """

    def __init__(self, settings: NetworkSettings):
        super().__init__()
        self.settings = settings
        # How `build` made the network, so that a checkpoint can recreate a frozen encoder.
        self.origin = {"initialisation": "scratch", "weights_file": "", "network_seed": 0}
        self.training_begun = "", ""  # written by `neurolib.training`
        options = {"num_classes": 0, "img_size": settings.size, "dynamic_img_size": True}
        name = settings.encoder.split(".")[0]
        try:
            self.encoder = timm.create_model(name, in_chans=settings.depth, **options)
            projection = self.encoder.patch_embed.proj
            # A hybrid begins with a CNN, and its patch embedding reads the channels of that CNN.
            plain = projection.in_channels == settings.depth and hasattr(self.encoder, "blocks")
        except (TypeError, AttributeError):  # no such arguments, or no patch embedding
            plain = False
        if not plain:
            raise SettingsError(
                f"encoder={settings.encoder!r}: not a plain vision transformer, whose patch "
                "embedding is one convolution over the image; choose a vit_..."
            )
        if projection.bias is None:
            # As in CLIP. Folding the input normalisation into the weights needs a bias.
            projection.bias = nn.Parameter(torch.zeros(projection.out_channels))
        layers = len(self.encoder.blocks)
        # Four evenly spaced depths, including the last (2, 5, 8, 11 of a ViT-S or ViT-B).
        self.taps = [layers * (i + 1) // 4 - 1 for i in range(4)]
        self.patch = self.encoder.patch_embed.patch_size[0]
        # In the small CPU setting (100 to 112), blocks are padded instead of scaled.
        self.pads = 1 <= settings.size / settings.block < 1.2
        outputs = 1 if settings.predict == "center" else settings.depth
        self.decoder = PyramidDecoder(self.encoder.embed_dim, settings.width)
        views = 2 if settings.contrast else 1  # brightness beside local contrast
        self.stem = Stem(views * settings.depth, settings.width // 4) if settings.stem else None
        features = settings.width // 2 + (settings.width // 4 if settings.stem else 0)
        self.head = nn.Sequential(
            convolution(features, settings.width // 2), nn.Conv2d(settings.width // 2, outputs, 1)
        )
        nn.init.constant_(self.head[-1].bias, EMPTY_LOGIT)

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        slices = blocks.squeeze(1)
        height, width = slices.shape[-2:]
        shown = local_contrast(slices) if self.settings.contrast else slices
        features = self.decoder(self._tokens(shown))
        # The encoder saw an enlarged block, or a padded one. The padding is cut off again, because
        # scaling it away would shift every voxel.
        area = [side + pad for side, pad in zip((height, width), self.padding(slices), strict=True)]
        features = resize_to(features, area)[..., :height, :width]
        if self.stem is not None:
            views = [slices, shown] if self.settings.contrast else [slices]
            features = torch.cat([features, self.stem(torch.cat(views, dim=1))], dim=1)
        return self.head(features)

    def encode(self, slices: torch.Tensor) -> list[torch.Tensor]:
        """Tokens (B, E, rows, columns) after four of the encoder's blocks, shallow to deep."""
        return self._tokens(local_contrast(slices) if self.settings.contrast else slices)

    def _tokens(self, shown: torch.Tensor) -> list[torch.Tensor]:
        """`encode` for slices that have already been turned into what the encoder sees."""
        return self.encoder.forward_intermediates(
            self.resize(shown), indices=self.taps, intermediates_only=True, output_fmt="NCHW"
        )

    def resize(self, slices: torch.Tensor) -> torch.Tensor:
        """Bring slices (B, D, h, w) to the encoder's scale and to multiples of its patch."""
        if self.pads:
            rows, columns = self.padding(slices)
            return F.pad(slices, (0, columns, 0, rows), mode="reflect")
        scale = self.settings.size / self.settings.block
        sides = [max(1, round(side * scale / self.patch)) for side in slices.shape[-2:]]
        return resize_to(slices, [side * self.patch for side in sides], "bicubic")

    def padding(self, slices: torch.Tensor) -> list[int]:
        """Rows and columns that `resize` adds below and to the right of slices (B, D, h, w)."""
        return [-side % self.patch if self.pads else 0 for side in slices.shape[-2:]]


class PyramidDecoder(nn.Module):
    """Tokens of four layers (B, channels, h, w) to features (B, width/2, 8h, 8w).

    UPerNet (Xiao et al. 2018) on a plain ViT: the layers are resized to 4, 2, 1 and 1/2 times the
    token grid, the coarsest is pooled at four sizes, a top-down path adds coarse maps to finer
    ones, and all are fused at the finest scale. Norms are GroupNorm because batches are small.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.scales, self.pools = (4, 2, 1, 0.5), (1, 2, 3, 6)
        self.laterals = nn.ModuleList(nn.Conv2d(channels, width, 1) for _ in self.scales)
        self.pooled = nn.ModuleList(nn.Conv2d(width, width // 4, 1) for _ in self.pools)
        self.bottleneck = convolution(2 * width, width)
        self.smooth = nn.ModuleList(convolution(width, width) for _ in self.scales[:-1])
        self.fuse = convolution(len(self.scales) * width, width)
        self.refine = convolution(width, width // 2)

    def forward(self, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        maps = []
        for layer, lateral, scale in zip(tokens, self.laterals, self.scales, strict=True):
            # This memory layout makes a training step a tenth faster on a CPU.
            level = lateral(layer.contiguous(memory_format=torch.channels_last))
            maps.append(resize_to(level, [side * scale for side in level.shape[-2:]]))
        coarse, area = maps[-1], maps[0].shape[-2:]
        context = [
            resize_to(project(F.adaptive_avg_pool2d(coarse, size)), coarse.shape[-2:])
            for size, project in zip(self.pools, self.pooled, strict=True)
        ]
        maps[-1] = self.bottleneck(torch.cat([coarse, *context], dim=1))
        for i in (2, 1, 0):
            maps[i] = self.smooth[i](maps[i] + resize_to(maps[i + 1], maps[i].shape[-2:]))
        fused = self.fuse(torch.cat([resize_to(level, area) for level in maps], dim=1))
        return self.refine(resize_to(fused, [2 * side for side in area]))


class Stem(nn.Module):
    """A small U-Net (Ronneberger et al. 2015) in the plane, (B, D, h, w) to (B, width, h, w).

    Slices are channels; rows and columns are halved three times. The stem locates at full
    resolution what the tokens recognise.
    """

    def __init__(self, inputs: int, width: int):
        super().__init__()
        sizes = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(
            nn.Sequential(convolution(a, b), convolution(b, b))
            for a, b in zip([inputs, *sizes], sizes, strict=False)
        )
        self.up = nn.ModuleList(
            nn.Sequential(convolution(a + b, b), convolution(b, b))
            for a, b in zip(sizes[1:], sizes, strict=False)
        )

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        maps = [self.down[0](slices)]
        for down in self.down[1:]:
            maps.append(down(F.max_pool2d(maps[-1], 2, ceil_mode=True)))
        features = maps.pop()
        for up, finer in zip(reversed(self.up), reversed(maps), strict=True):
            features = up(torch.cat([resize_to(features, finer.shape[-2:]), finer], dim=1))
        return features


def local_contrast(slices: torch.Tensor) -> torch.Tensor:
    """Brightness relative to the surroundings, independent of exposure and background.

    Slices (B, D, h, w) become (B, D, h, w) in [0, 1]: x minus its mean over about 12 pixels,
    divided by the standard deviation over about 25 pixels plus the median of these deviations;
    -1.5 to 8 become 0 to 1. Means and deviations are taken over all slices together.
    """
    slices = slices.float()
    above = slices - _surroundings(slices, 12)
    deviation = _surroundings(above**2, 25).clamp_min(0).sqrt()
    usual = deviation.flatten(1).median(dim=1).values[:, None, None, None]
    low, high = -1.5, 8.0
    return ((above / (deviation + usual + 1e-4)).clamp(low, high) - low) / (high - low)


def _surroundings(slices: torch.Tensor, pixels: int) -> torch.Tensor:
    """Mean over slices and about `pixels` rows and columns around each, (B, 1, h, w)."""
    cells = [max(1, round(side / pixels)) for side in slices.shape[-2:]]
    coarse = F.adaptive_avg_pool2d(slices.mean(1, keepdim=True), cells)
    return resize_to(coarse, slices.shape[-2:])


def make(settings: NetworkSettings) -> nn.Module:
    """The network of these settings with random weights: a `Segmenter`, or the U-Net."""
    return UNet(settings) if settings.encoder == UNET else Segmenter(settings)


def build(
    settings: NetworkSettings, initialisation: str, weights_file: str = "", seed: int = 0
) -> tuple[Segmenter, LoadReport | None]:
    """Build a network and initialise its encoder.

    Parameters
    ----------
    settings : NetworkSettings
    initialisation : {"scratch", "average", "center", "gaussian", "random"}
        ``scratch``: timm's random initialisation, with LayerScale at 1; the only one for the
        U-Net. The others load pre-trained 2D weights and inflate them.
    weights_file : str
        Your own file of 2D weights; if empty, the sources of `load_pretrained`.
    seed : int
        Seeds the decoder, a scratch encoder and ``random`` inflation. With the same seed, the
        decoder is the same under every initialisation.

    Returns
    -------
    (network, report)
        The report says which keys the pre-trained weights filled; None for ``scratch``.
    """
    torch.manual_seed(seed)
    network = make(settings)
    origin = {"initialisation": initialisation, "weights_file": str(weights_file)}
    network.origin = origin | {"network_seed": seed}
    if initialisation == "scratch":
        # Some architectures scale what a block adds, initially by 1e-5. In a short training run,
        # such blocks would have no effect.
        for name, scale in network.encoder.named_parameters() if network.encoder else ():
            if "gamma" in name:
                nn.init.ones_(scale)
        return network, None
    if network.encoder is None:
        raise SettingsError(
            f"initialisation={initialisation!r}: {settings.encoder} has no pre-trained weights; "
            "expected 'scratch'"
        )
    if weights_file and "." not in settings.encoder:
        warnings.warn(
            f"encoder={settings.encoder}: images are normalised as for timm's default weights; if "
            "yours were trained otherwise, name the variant, as in vit_small_patch16_224.dino",
            NeurolibWarning,
            stacklevel=2,
        )
    weights = load_pretrained(settings.encoder, weights_file or None)
    generator = torch.Generator().manual_seed(seed)
    normal = normalisation(settings.encoder)
    return network, inflate_encoder(network.encoder, weights, initialisation, *normal, generator)


def normalisation(encoder: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, per channel, of the images that an encoder was trained on."""
    config = timm.get_pretrained_cfg(encoder)
    return tuple(config.mean), tuple(config.std)


@torch.inference_mode()
def token_colours(networks: Mapping[str, Segmenter], slices: torch.Tensor) -> dict[str, np.ndarray]:
    """The last tokens of a block as images: three principal components as red, green, blue.

    Slices (1, D, h, w) become one array (rows, columns, 3) per network, one pixel per token. The
    networks share the components, so the tokens of each are first centred and scaled to the same
    spread. Each component is stretched to [0, 1].
    """
    tokens = {name: network.encode(slices)[-1][0] for name, network in networks.items()}
    flat = torch.stack([grid.flatten(1).T.double() for grid in tokens.values()])
    flat = flat - flat.mean(1, keepdim=True)
    flat = flat / flat.std(dim=(1, 2), keepdim=True)
    _, _, directions = torch.linalg.svd(flat.flatten(0, 1), full_matrices=False)
    # The sign of a direction is arbitrary; a fixed one makes pictures reproducible.
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    colours = flat @ (directions * signs)[:3].T
    low, high = colours.amin((0, 1)), colours.amax((0, 1))
    colours = ((colours - low) / (high - low)).numpy()
    return {
        name: colour.reshape(*tokens[name].shape[1:], 3)
        for name, colour in zip(tokens, colours, strict=True)
    }


@torch.inference_mode()
def attention(network: Segmenter, slices: torch.Tensor) -> torch.Tensor:
    """Attention (B, heads, N, N) of the encoder's last block: softmax(q kᵀ / √d), from timm.

    Each row holds the weights of one looking token and adds up to one; N includes the class and
    register tokens, which come first. timm's fused kernel never holds this matrix, so the last
    block of `network`, in evaluation mode, takes timm's other path for one pass. This includes
    rotary embeddings and the norms of q and k. Slices are (B, D, h, w).
    """
    layer = getattr(network.encoder.blocks[-1], "attn", None)
    if not hasattr(layer, "fused_attn") or not hasattr(layer, "attn_drop"):
        raise SettingsError(
            f"encoder={network.settings.encoder!r}: its last block hides its attention; expected "
            "timm's Attention or EvaAttention"
        )
    seen = []
    hook = layer.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    fused, layer.fused_attn = layer.fused_attn, False
    try:
        network.encode(slices)
    finally:
        layer.fused_attn = fused
        hook.remove()
    return seen[0]


def class_attention(network: Segmenter, slices: torch.Tensor) -> np.ndarray:
    """Where the class token looks in the encoder's last block, one map per head.

    Slices (1, D, h, w) become an array (heads, rows, columns): the attention to each patch. The
    rest, up to one, goes to class and register tokens. Without a class token, it is the mean over
    all tokens.
    """
    weights = attention(network, slices)[0]
    looks = weights.mean(1) if network.encoder.cls_token is None else weights[:, 0]
    rows, columns = (side // network.patch for side in network.resize(slices).shape[-2:])
    return looks[:, -rows * columns :].reshape(-1, rows, columns).numpy()


def cost(settings: NetworkSettings) -> dict[str, tuple[int, int]]:
    """Parameters and floating-point operations (FLOPs) of one forward pass of one block.

    torch's `FlopCounterMode` counts on the meta device: nothing is computed, and no fused kernel
    hides products from the counter, as the one for attention does on a CPU. A multiplication and an
    addition are two operations. Matrix products and convolutions are counted; norms, activations
    and resizing are not, because they are small in comparison. ``network`` contains ``encoder``,
    which contains ``patch embedding``.
    """
    with torch.device("meta"):
        network = Segmenter(settings).eval()
        slices = torch.zeros(1, settings.depth, settings.block, settings.block)
    embedding = network.encoder.patch_embed
    modules = {
        "patch embedding": (embedding, _flops(embedding, network.resize(slices))),
        "encoder": (network.encoder, _flops(network.encode, slices)),
        "network": (network, _flops(network, slices[:, None])),
    }
    return {
        name: (sum(p.numel() for p in module.parameters()), flops)
        for name, (module, flops) in modules.items()
    }


def costs(settings: NetworkSettings) -> list[dict[str, int | float | str]]:
    """`cost` of networks that differ only in their depth (1 to 9), as rows of a table.

    Millions of parameters, and 10⁹ FLOPs per block (GFLOPs), compared with those of the first.
    """
    rows = []
    for depth in (1, 3, 5, 7, 9):
        row = {"slices": depth}
        for name, (parameters, flops) in cost(replace(settings, depth=depth)).items():
            row |= {f"{name}, M parameters": parameters / 1e6, f"{name}, GFLOPs": flops / 1e9}
        ratio = row["network, GFLOPs"] / (rows or [row])[0]["network, GFLOPs"]
        rows.append(row | {"GFLOPs over depth 1": f"{ratio - 1:+.1%}"})
    return rows


def describe_encoders() -> list[dict[str, int | str]]:
    """What the installed timm knows about `ENCODERS`, as rows of a table.

    The columns are patch, width, layers, parameters in millions, side of timm's default images,
    licence of the weights as timm records it, and a link to the weights.
    """
    rows = []
    for name in filter(lambda name: timm.is_model(name.split(".")[0]), ENCODERS):
        config = timm.get_pretrained_cfg(name)
        with torch.device("meta"):
            model = timm.create_model(name.split(".")[0], num_classes=0)
        rows.append(
            {
                "encoder": name,
                "patch": model.patch_embed.patch_size[0],
                "width": model.embed_dim,
                "layers": len(model.blocks),
                "M parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
                "image": config.input_size[-1],
                "licence": config.license or "not stated by timm",
                "source": f"[hub](https://huggingface.co/{config.hf_hub_id})",
            }
        )
    return rows


def _flops(call: Callable, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(*inputs)
    return counter.get_total_flops()


class UNet(nn.Module):
    """For comparison: MONAI's residual U-Net (Kerfoot et al. 2019) on the same blocks of slices.

    Only the settings depth, block and predict matter. It has the same input and output as a
    `Segmenter`.
    """

    encoder = None  # nothing is pre-trained

    def __init__(self, settings: NetworkSettings):
        super().__init__()
        try:
            from monai.networks.nets import UNet as Residual
        except ImportError:
            raise SettingsError(
                f"encoder={settings.encoder!r}: needs MONAI; pip install monai"
            ) from None
        self.settings = settings
        self.origin = {"initialisation": "scratch", "weights_file": "", "network_seed": 0}
        self.training_begun = "", ""
        self.body = Residual(3, 1, 1, channels=CHANNELS, strides=STRIDES, num_res_units=2)
        last = [m for m in self.body.modules() if isinstance(m, nn.Conv3d) and m.out_channels == 1]
        nn.init.constant_(last[-1].bias, EMPTY_LOGIT)

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        depth, height, width = blocks.shape[-3:]
        rows, columns = (-side % 2 ** len(STRIDES) for side in (height, width))
        # Slices are channels here, so that only rows and columns are reflected.
        flat = F.pad(blocks[:, 0], (0, columns, 0, rows), mode="reflect")
        logits = self.body(flat[:, None])[:, 0, :, :height, :width]
        return logits if self.settings.predict == "all" else logits[:, depth // 2][:, None]

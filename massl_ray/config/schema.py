"""Every setting, with its unit, range and default. Imports neither torch nor ray."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Auto = Literal["auto"]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunSection(Section):
    """Where the run lives."""

    dir: Annotated[str, Field(min_length=1)] = "runs/demo"
    """Run directory: configuration, metrics, checkpoints, report. Run the same command again to continue it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every draw: weights, memory, order, views, drop path, blocks."""


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
IMAGENET_GRAY = {"mean": (0.449,), "std": (0.226,)}  # means over the three


class DataSection(Section):
    """The images."""

    source: Annotated[str, Field(min_length=1)] = "demo"
    """Images at a path or URI: a folder (any nesting), a pattern, a text file of paths, Parquet files, WebDataset shards, a saved
    Hugging Face data set, or what `massl-ray prepare` wrote. 'demo': the tiles that come with scikit-image."""
    test_source: str | None = None
    """Test images for k-NN, any source with the classes of data.source. None: a tenth of data.source is held out as queries."""
    cache_gb: Annotated[float, Field(ge=0, le=1e6)] = 50.0
    """Disk space on each machine for prepared images that lie at a URI, in gigabytes; the least recently used are given up."""
    window: Annotated[int, Field(ge=0)] = 0
    """Shards (or row groups of Parquet) that are shuffled together, for data sets that are larger than data.cache_gb: half of what
    that holds. 0: the whole data set at once."""
    max_skipped: Share = 0.05
    """Share of unreadable images, among those tried, above which the run stops."""
    max_pixels: Annotated[int, Field(ge=1)] = 200_000_000
    """Images of more pixels count as unreadable: a small file can hold an enormous image."""
    channels: Annotated[int, Field(ge=1, le=1024)] = 3
    """That images are decoded to. 1: gray. 3: red, green and blue. Any other number: that of the bands of TIFF files or numpy
    arrays (.npy). Colour jitter of other than 3 changes brightness and contrast only."""
    white: Annotated[int, Field(ge=1, le=2**32)] = 65535
    """The level that becomes 255 where images have whole numbers of more than 8 bits; higher ones do, too. 4095 for cameras of 12
    bits, 10000 for reflectances of Sentinel-2."""
    mean: tuple[float, ...] = ()
    """Channel means (in 0..1) subtracted from every view. Empty: ImageNet's for 3 channels; for any other number those that
    `massl-ray prepare` measured, or of gray images that were not prepared ImageNet's."""
    std: tuple[Positive, ...] = ()
    """Channel standard deviations (in 0..1) that every view is divided by. Empty: as with data.mean."""

    @model_validator(mode="before")
    @classmethod
    def _imagenet(cls, given: Any) -> Any:
        if not isinstance(given, dict):  # which is refused in a moment
            return given
        empty = [key for key in IMAGENET if not given.get(key)]
        return given | {key: IMAGENET[key] for key in empty} if given.get("channels", 3) in (3, "3") else given

    @model_validator(mode="after")
    def _one_for_each_channel(self) -> "DataSection":
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) != self.channels:
                raise ValueError(
                    f"data.{key} has {len(values)} values (a preset's, if you gave none), data.channels is {self.channels}: "
                    "give one for each channel"
                )
        return self


class ViewsSection(Section):
    """Multi-crop views and their augmentation, in the paper's order."""

    global_size: Annotated[int, Field(ge=8)] = 224
    """Side of the two global views, in pixels."""
    local_size: Annotated[int, Field(ge=8)] = 96
    """Side of the local views, in pixels."""
    num_local: Annotated[int, Field(ge=0)] = 10
    """Local views an image."""
    global_area: tuple[Share, Share] = (0.32, 1.0)
    """Smallest and largest share of the image's area that a global view covers."""
    local_area: tuple[Share, Share] = (0.05, 0.32)
    """Smallest and largest share of the image's area that a local view covers."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Probability = 0.8
    """Probability of colour jitter."""
    brightness: Probability = 0.4
    """Colour jitter: brightness factor drawn from 1 +- this."""
    contrast: Probability = 0.4
    """Colour jitter: contrast factor drawn from 1 +- this."""
    saturation: Probability = 0.2
    """Colour jitter: saturation factor drawn from 1 +- this."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Colour jitter: hue shift drawn from +- this, in turns of the colour wheel."""
    gray: Probability = 0.2
    """Probability of turning the view gray."""
    blur: tuple[Probability, Probability, Probability] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur on the first global, the second global and the local views."""
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels of the view."""
    solarize: Probability = 0.2
    """Probability of solarizing the second global view."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cpu: Ray Data tasks make the views. cuda: they only decode, and each worker makes the views on its GPU; for clusters with
    few CPUs a GPU."""


class ModelSection(Section):
    """The backbone."""

    backbone: str = "vit_small_patch16_224"
    """Any timm model name."""
    init: str = "random"
    """'random', 'pretrained' (timm's weights) or the path of a weights file (.safetensors, or .pth read without executing code)."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Stochastic depth of the student's last block; the teacher has none."""


class HeadSection(Section):
    """The projection head: a multi-layer perceptron onto the unit sphere."""

    num_layers: Annotated[int, Field(ge=1)] = 3
    """Linear layers."""
    hidden_dim: Annotated[int, Field(ge=1)] = 2048
    """Width of the hidden layers."""
    dim: Annotated[int, Field(ge=2)] = 256
    """Width of the embedding, and of the memory's rows."""
    batch_norm: bool = False
    """Batch norm after each hidden layer. It helps convolutional backbones on small data sets."""


class MemorySection(Section):
    """The memory of past embeddings."""

    size: Annotated[int, Field(ge=2)] | Auto = "auto"
    """Slots K. auto: 8,192 up to 20 thousand images, rising to 131,072 from a million on."""
    num_blocks: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Random blocks the memory is read in; a block has size // num_blocks slots. auto: 8."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """How rows are stored; similarities and sums are fp32 either way."""


class LossSection(Section):
    """The read-out loss."""

    recipe: Literal["auto", "paper", "joined"] = "auto"
    """What loss.batch_slots and loss.koleo_weight are where they are auto. paper: the memory alone, no spread term. joined: the
    batch joins every block, and KoLeo weighs 1, which learns more from small data sets (docs/log.md). auto: joined below a million
    images, else paper."""
    batch_slots: bool | Auto = "auto"
    """Whether the teacher's embeddings of the step's own images join every block of the memory before it is read. auto: by
    loss.recipe."""
    student_temp: Positive = 0.1
    """Temperature of the student's similarities."""
    teacher_temp: Positive | Auto = "auto"
    """Temperature of the teacher's similarities after the rise. auto: 0.04 up to 20 thousand images,
    rising to 0.07 at a million."""
    teacher_temp_start: Positive | Auto = "auto"
    """Temperature of the teacher's similarities at the first step. auto: 0.04, or teacher_temp where that is lower."""
    teacher_temp_epochs: Annotated[float, Field(ge=0)] | Auto = "auto"
    """Epochs over which the teacher's temperature rises. auto: 30, at most a tenth of the run."""
    koleo_weight: Annotated[float, Field(ge=0)] | Auto = "auto"
    """Weight of the KoLeo spread term on the student's global embeddings. It looks at one micro-batch, so it wants
    train.micro_batch_size of 32 or more. auto: by loss.recipe, 1 or 0."""


class OptimSection(Section):
    """AdamW and its schedules, all cosine functions of images seen."""

    lr: Positive = 5e-4
    """Peak learning rate for a batch of 256; it is scaled by train.global_batch_size / 256."""
    lr_final: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the end."""
    warmup_epochs: Annotated[float, Field(ge=0)] | Auto = "auto"
    """Epochs of linear warm-up from 0. auto: 0 up from a million images (ViT-S recipe), else 10, at most a tenth of the run."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    """Weight decay at the start; none on biases and one-dimensional parameters."""
    weight_decay_final: Annotated[float, Field(ge=0)] = 0.4
    """Weight decay at the end."""
    clip_norm: Positive = 3.0
    """Largest gradient norm of each parameter tensor."""
    teacher_momentum: Probability = 0.992
    """Momentum of the teacher's moving average at the start."""
    teacher_momentum_final: Probability = 1.0
    """Momentum of the teacher's moving average at the end."""


class TrainSection(Section):
    """The run's length, batch and arithmetic."""

    epochs: Positive = 800.0
    """Passes over the images. train.steps takes precedence."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps, instead of epochs."""
    stop_at: Annotated[int, Field(ge=1)] | None = None
    """Step after which the run stops, though its schedules go on to its full length. Raise it, or leave it out, to continue."""
    global_batch_size: Annotated[int, Field(ge=2)] = 1024
    """Images a step, over all workers; it never changes with their number."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Images computed at once; it divides the batch, and workers share out whole micro-batches. auto:
    the largest divisor up to 64."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the backbone. Head, read-out and optimizer are always fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where the cluster has GPUs."""
    compile: bool = False
    """Compile the backbones with torch.compile: faster steps on GPUs, minutes to start."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads a worker computes with."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
    """Steps between checkpoints."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between looks at the metrics: each look waits for the device and writes one line a step."""


class CheckpointSection(Section):
    """Which checkpoints stay. The one with the best k-NN accuracy always does."""

    keep: Annotated[int, Field(ge=1)] = 2
    """How many of the latest checkpoints are kept."""


class EvalSection(Section):
    """k-NN on teacher features while training, where images have class folders."""

    knn_every: Annotated[int, Field(ge=0)] = 1000
    """Steps between k-NN evaluations. 0: never while training."""
    knn_k: Annotated[int, Field(ge=1)] = 20
    """Neighbours that vote."""
    knn_temp: Positive = 0.07
    """Temperature of the votes' weights."""
    crop: Share = 0.875
    """Share of the shorter side that the centred evaluation view covers."""
    max_images: Annotated[int, Field(ge=2)] = 5000
    """At most this many images each side, evenly spaced through the listing."""


class MonitorSection(Section):
    """When a run counts as collapsed or dead, and is stopped."""

    min_spread: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Embedding spread (1: evenly over the sphere, 0: one point) under which a step counts towards a collapse."""
    min_kl: Annotated[float, Field(ge=0)] = 0.15
    """What the student can still learn (`kl`, nats), under which a step counts towards a death, if the teacher tells images apart
    hardly at all. 0: never."""
    patience: Annotated[int, Field(ge=1)] = 50
    """Such steps in a row that stop the run."""


class ElasticSection(Section):
    """How many workers, and what becomes of the run when machines come and go."""

    min_workers: Annotated[int, Field(ge=1)] = 1
    """Fewest workers to train with."""
    max_workers: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Most workers. auto: one a GPU; without GPUs one a node, leaving at least half of the CPUs to Ray Data."""
    view_tasks: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Tasks that make views at the same time, for each worker. auto: by the CPUs that no worker computes with."""
    exact: bool = True
    """Sum over micro-batches in one fixed order, so that the result is the same, bit for bit, at any number of workers.
    false: DistributedDataParallel's order, equal within rounding."""
    in_place: bool = True
    """Workers that stay keep their process and model when the number of workers changes; Ray Train only holds the machines for
    them. false: Ray Train starts every worker anew, which takes several times as long. The result is the same."""
    max_lost_seconds: Positive = 30.0
    """A machine that vanishes costs at most this much training, in seconds: so often a copy of the state goes to the head node."""
    timeout_seconds: Annotated[float, Field(ge=10)] = 600.0
    """Seconds that workers wait for one that says nothing any more, before they start again without it."""
    max_failures: Annotated[int, Field(ge=0)] = 8
    """Failures in a row, without a new step between them, after which the run gives up. Machines that leave after a notice
    and resizes do not count."""


class Config(BaseSettings):
    """A whole run. Keys are written section.key; unknown keys are refused."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    views: ViewsSection = ViewsSection()
    model: ModelSection = ModelSection()
    head: HeadSection = HeadSection()
    memory: MemorySection = MemorySection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    monitor: MonitorSection = MonitorSection()
    elastic: ElasticSection = ElasticSection()

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, env_settings, dotenv_settings, file_secret_settings):
        return (init_settings,)  # no environment variables: a run is what its file and flags say

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        for name in ("global_area", "local_area", "blur_sigma"):
            low, high = getattr(self.views, name)
            if low > high:
                raise ValueError(f"views.{name} must rise: its lower bound {low} is above its upper bound {high}")
        size, blocks = self.memory.size, self.memory.num_blocks
        if size != "auto" and blocks != "auto" and size < 2 * blocks:
            raise ValueError(
                f"memory.size {size} is too small for memory.num_blocks {blocks}: a block needs at least two slots; "
                f"raise memory.size to {2 * blocks} or more, or lower memory.num_blocks"
            )
        micro, batch = self.train.micro_batch_size, self.train.global_batch_size
        if micro != "auto" and batch % micro:
            raise ValueError(
                f"train.micro_batch_size {micro} must divide train.global_batch_size {batch}; the nearest that does "
                f"is {_nearest_divisor(batch, micro)}"
            )
        if self.elastic.max_workers != "auto" and self.elastic.max_workers < self.elastic.min_workers:
            raise ValueError(
                f"elastic.max_workers {self.elastic.max_workers} is below elastic.min_workers "
                f"{self.elastic.min_workers}; raise the one or lower the other"
            )
        return self


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((size for size in range(1, number + 1) if number % size == 0), key=lambda size: abs(size - wanted))


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, those of `over` on top."""
    merged = dict(base)
    for key, value in over.items():
        merged[key] = merge(merged[key], value) if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) else value
    return merged

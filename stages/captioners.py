"""Vision language models: pictures and questions in, answers out.

    model = open_vlm("weights/some-vlm", device="cuda", dtype="bfloat16")
    answers = model.ask(pictures, ["Describe the picture."] * len(pictures), Sampling(max_tokens=128))
    answers[0].text, answers[0].status, answers[0].completion_tokens

Any image-text-to-text model that transformers saved to a folder will do, by its own processor and chat template; no
code from the folder is run and no pickle opened. Questions go through in one padded batch. Sampling is seeded by
question: noise drawn from a question's own generator is added to its logits and the largest taken (the Gumbel-max
trick, which draws exactly from the softmax), so that who else is in the batch has no say in it beyond the last bits.

`stages.openai_server` asks a server instead; both give the same `Answer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.contract import file_digest, weights_digest

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

SUCCESS, TRUNCATED, REFUSED, ERROR, SKIPPED = STATUSES = ("success", "truncated", "refused", "error", "skipped")
READ_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. max_tokens: of the answer. temperature 0: always the likeliest token."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sampling: max_tokens {self.max_tokens} must be at least 1, temperature {self.temperature} not "
                f"negative and top_p {self.top_p} in (0, 1]"
            )

    def plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """What became of one question. status: one of STATUSES; reason says why it is not "success"; token counts are the
    model's own."""

    status: str
    text: str = ""
    reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class VisionLanguageModel:
    """A model in transformers' format. digest: 32 hex digits over every file that decides an answer."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: str = "bfloat16") -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.folder, self.device = folder, device
        self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(
                f"captioner {folder}: its processor has no chat template; use an instruction-tuned model, or put "
                "chat_template.jinja into the folder"
            )
        self.processor.tokenizer.padding_side = "left"
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=getattr(torch, dtype)
        )
        self.model = model.to(device).eval().requires_grad_(False)
        ends = model.generation_config.eos_token_id
        ends = self.processor.tokenizer.eos_token_id if ends is None else ends
        self.ends = {int(end) for end in (ends if isinstance(ends, Sequence) else [ends])}

    @property
    def digest(self) -> str:
        return weights_digest((name, file_digest(path)) for name, path in vlm_files(self.folder).items())

    def ask(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        sampling: Sampling = Sampling(),
        seeds: Sequence[int] | None = None,
    ) -> list[Answer]:
        """One answer for each (RGB picture, prompt), drawn with its seed (default: 0, 1, ...)."""
        import torch
        from transformers import GenerationConfig

        if not pictures:
            return []
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
                add_generation_prompt=True,
            )
            for prompt in prompts
        ]
        inputs = self.processor(
            text=texts, images=[[picture] for picture in pictures], padding=True, return_tensors="pt"
        ).to(self.device, self.model.dtype)
        noise = []
        if sampling.temperature > 0:
            noise = [_seeded_noise(sampling, range(len(prompts)) if seeds is None else seeds)]
        with torch.inference_mode():
            tokens_BL = self.model.generate(
                **inputs,
                logits_processor=noise,
                generation_config=GenerationConfig(
                    max_new_tokens=sampling.max_tokens,
                    do_sample=False,
                    eos_token_id=sorted(self.ends),
                    pad_token_id=self.processor.tokenizer.pad_token_id,
                ),
            )
        asked = inputs["input_ids"].shape[1]
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [self._answer(row, length) for row, length in zip(tokens_BL[:, asked:].tolist(), lengths, strict=True)]

    def _answer(self, tokens: list[int], prompt_tokens: int) -> Answer:
        """The text up to the first end mark; without one the answer was cut off."""
        end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        text = self.processor.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
        if end is None:
            return Answer(TRUNCATED, text, f"no end within {len(tokens)} tokens", prompt_tokens, len(tokens))
        return Answer(SUCCESS, text, "", prompt_tokens, end + 1)


def _seeded_noise(sampling: Sampling, seeds: Sequence[int]) -> Any:
    """A logits processor whose argmax is a draw by temperature and top_p, from one generator a row."""
    import torch
    from transformers import LogitsProcessor, TopPLogitsWarper

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None

    class SeededNoise(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            logits_BV = scores.float() / sampling.temperature
            if top_p is not None:
                logits_BV = top_p(input_ids, logits_BV)
            uniform_BV = torch.stack([torch.rand(scores.shape[1], generator=one) for one in generators])
            # u = 0 would give an infinite draw; the smallest float above it does not.
            gumbel_BV = -torch.log(-torch.log(uniform_BV.clamp_min(torch.finfo(torch.float32).tiny)))
            return logits_BV + gumbel_BV.to(logits_BV.device)

    return SeededNoise()


def vlm_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder that decide its answers, by name. Raises FileNotFoundError without weights."""
    files = {path.name: path for path in sorted(folder.iterdir()) if path.suffix in READ_SUFFIXES}
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise FileNotFoundError(
            f"captioner {folder} has no config.json with *.safetensors: name a folder that save_pretrained wrote"
        )
    return files


def open_vlm(folder: Path | str, *, device: str = "cpu", dtype: str = "bfloat16") -> VisionLanguageModel:
    """The image-text-to-text model in `folder`. Raises FileNotFoundError or ValueError with what is missing."""
    place = Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"captioner {folder} is not a folder: name one that save_pretrained wrote")
    vlm_files(place)
    return VisionLanguageModel(place, device, dtype)

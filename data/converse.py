"""Stage `converse`: conversations that the original model has with itself, for sources of kind=generated.

    python -m data.converse data=chat

Plain text heals what a chat model knows of text, not how it answers (docs/log.md). Where no conversations are at hand,
the model's own will do (data/speaker.py): they need no download and are what it would say. All of them are for
training: what validation reads stays real text. The model has to fit on one device.

Written: `conversations-<n>.jsonl`, rows {"messages": [{role, content}, ...]}, the answer with what ended it. Every file
has a seed of its own, so a killed run goes on with the file that it was at.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import transformers
from omegaconf import DictConfig

from conf.checkpoint import NOT_OURS, load_model
from conf.devices import pick_device
from conf.errors import stage_main
from conf.models import local_model
from conf.plan import Plan
from conf.precision import Dtype, torch_dtype
from conf.pretrained import load_config, load_tokenizer
from conf.progress import Progress
from conf.schema import Config, SourceKind
from conf.stage import digest
from data.calibration import training_texts
from data.chats import Message, as_text, chat_tokens, require_template
from data.documents import train_tokens
from data.speaker import Speaker
from mha2mla import ConversionOptions, resolve_options

MORE = 1.05  # tokens generated for each that is wanted


def converse(config: Config) -> None:
    """Run the stage: as many conversations as the generated source's share of the training tokens."""
    plan = Plan(config)
    stage = plan.converse
    if not plan.converses:
        raise ValueError("no source of kind=generated among data.sources; there is one in data=chat")
    if stage.skip(config.force):
        return
    print("converse: loading the original, which then talks to itself", flush=True)
    path, revision = local_model(config), config.model.revision
    tokenizer = load_tokenizer(path, revision)
    require_template(tokenizer, "a source of kind=generated")
    # What conversion refuses is refused before time is spent on talking.
    resolve_options(load_config(path, revision), ConversionOptions.from_config(config.mla))
    wanted = int(MORE * generated_share(config) * train_tokens(config))
    with stage.run(resumable=True, force=config.force):
        data = config.data
        speaker = Speaker(load(config, path), tokenizer, endless(config), data.sequence_length, data.seed)
        stage.metrics.update(talk(speaker, wanted, stage.folder))
    found = stage.metrics
    print(f"converse: {found['tokens']:,} tokens of {found['conversations']:,} conversations, in {stage.folder}")


def load(config: Config, path: str) -> Any:
    """The original in the dtype that is fast here, unless another was asked for."""
    device = pick_device(config.launch.device)
    wanted = Dtype.native if config.model.dtype is Dtype.auto else config.model.dtype
    dtype = torch_dtype(wanted, device == "cpu", stored="auto")
    return load_model(path, dtype, NOT_OURS, config.model.revision, device)


def talk(speaker: Speaker, wanted: int, folder: Path) -> dict[str, int]:
    """Files of conversations until there are so many tokens, copies counted once."""
    progress, files, tokens = Progress("converse", wanted, "tokens"), 0, 0
    seen: set[str] = set()
    speaker.on_step = lambda step, room: progress.advance(0, f"batch {files + 1} at token {step} of {room}")
    while tokens < wanted:
        file = folder / f"conversations-{files:05d}.jsonl"
        if not file.exists():
            write_chats(file, speaker.conversations(files))
        chats = {digest(chat): as_text(chat) for chat in read_chats(file)}
        new = chats.keys() - seen
        if not new:
            raise ValueError(
                f"the model has nothing more to say to itself after {len(seen):,} conversations of {tokens:,} tokens, "
                f"{wanted:,} wanted: lower the weight of the generated source, or give a source of real conversations "
                "(messages_column)"
            )
        found = sum(len(chat_tokens(speaker.tokenizer, chats[key])) for key in new)
        progress.advance(found)
        seen |= new
        tokens, files = tokens + found, files + 1
    progress.close()
    return {"tokens": tokens, "conversations": len(seen), "files": files}


def generated_share(config: Config) -> float:
    """Of the training tokens."""
    sources = config.data.sources.values()
    own = sum(source.weight for source in sources if source.kind is SourceKind.generated)
    return own / sum(source.weight for source in sources)


def endless(config: Config) -> Iterator[str]:
    """Texts to ask about, over and over; none where all other sources are conversations themselves."""
    found = True
    while found:
        found = False
        for text in training_texts(config):
            found = True
            yield text


def write_chats(file: Path, chats: list[list[Message]]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    temporary.replace(file)


def read_chats(file: Path) -> Iterator[list[Message]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["messages"]


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    transformers.utils.logging.disable_progress_bar()
    stage_main(converse)(cfg)


if __name__ == "__main__":
    main()

"""`megavlm recipe check`: every mistake that can be found before a run starts, its data included. Tested by `tests/launch/test_init.py`."""

import logging
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TypeVar

from megavlm.config import RunConfig
from megavlm.data.pack.encode import Encoder
from megavlm.data.pack.overlong import encode_within
from megavlm.data.pack.sources import make_sources
from megavlm.data.read.index import read_index
from megavlm.data.read.place import reading_sample
from megavlm.data.read.shards import expand_shards
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.fit_losses import Losses
from megavlm.data.tools.lint import Report, read_samples
from megavlm.data.tools.tokenize import check_codes
from megavlm.errors import DataError, MegavlmError
from megavlm.image_tokenizers.protocol import GridOnly
from megavlm.model.sizes import parameter_sizes
from megavlm.parts.fitness import check_lanes, check_model
from megavlm.parts.parts import Parts

log = logging.getLogger(__name__)
T = TypeVar("T")


class Check:
    """The findings of one recipe.

    Args:
        config: The recipe, read without mistakes.
        num_samples: The first samples of each source that are read; 0 is all.
    """

    def __init__(self, config: RunConfig, num_samples: int):
        self.config = config
        self.num_samples = num_samples
        self.problems: list[str] = []
        self.facts: list[str] = []

    def run(self) -> None:
        parts = Parts(self.config)
        encoder = self._try(lambda: parts.encoder)
        if encoder:
            self._try(lambda: check_model(parts, 1))
            self._try(lambda: parts.phases)
            self._try(lambda: check_lanes(self.config, 1))
            self._try(lambda: self.facts.append(f"model: {sum(parameter_sizes(parts.model_configuration)):,} parameters"))
        for block, sources in (("data", self.config.data.sources), ("validation", self.config.validation.sources)):
            for name, source in sources.items():
                self._try(lambda name=name, source=source, block=block: self._read(f"{block}.sources.{name}", name, source, encoder))
        if self.config.evaluation.shards is not None:
            self._try(lambda: expand_shards("", self.config.evaluation.shards or []))
        if (init_from := self.config.init_from) and not Path(init_from).is_dir():
            self.problems.append(f"init_from: there is no folder {init_from}\n  do:    correct the path")

    def _try(self, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except MegavlmError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def _read(self, path: str, name: str, config: SourceConfig, encoder: Encoder | None) -> None:
        (source,) = make_sources({name: config})
        report, tasks, losses = Report(), Counter(), Losses(encoder.image_tokenizer) if encoder else None
        if encoder:
            check_codes(list(source.urls), encoder.image_tokenizer)
            # images are not tokenized: their grids are enough
            encoder = Encoder(encoder.vocabulary, GridOnly(encoder.image_tokenizer))
        samples = read_samples(list(source.urls), source.config, report)
        for sample in islice(samples, self.num_samples or None):
            tasks[sample.task] += 1
            if losses:
                losses.add(sample)
            url = source.urls[sample.coordinates.shard]
            try:
                if encoder:
                    with reading_sample(name, url, sample.key):
                        encode_within(sample, encoder, self.config.data.sample_tokens, self.config.data.over_long)
            except DataError as error:
                report.add(error, url, sample.key)
        self.problems += [f"{path}: {problem}" for problem in report.grouped()]
        indexes = [index for url in source.urls if (index := read_index(url))]
        known = f"{sum(index.samples for index in indexes)} samples" if len(indexes) == len(source.urls) else "without indexes"
        shares = ", ".join(f"{task} {count}" for task, count in tasks.items())
        self.facts.append(f"{path}: {len(source.urls)} shards, {known}, {source.config.format}; read {report.num_samples}: {shares}")
        self.facts += [f"{path}: {line}" for line in losses.lines()] if losses else []

"""Makes step 0, from the source's headers to the proof."""

import hashlib
import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from torchtitan.tools.logging import logger

from flame_ext.config.sections import Seed
from flame_ext.distributed import failing_together, gathered, is_main_rank
from flame_ext.errors import SeedError
from flame_ext.files import write_json
from flame_ext.model.freezing import OPTION as FREEZE
from flame_ext.seeding.accounting import Account, account, require_same_function
from flame_ext.seeding.names import in_model_names, parse_key_map, renamed
from flame_ext.seeding.new_parameters import initialise
from flame_ext.seeding.new_rows import fill_new_rows
from flame_ext.seeding.proof.attention import prove_attention
from flame_ext.seeding.proof.parity import Probe, verify
from flame_ext.seeding.proof.reference import Reference
from flame_ext.seeding.proof.replicas import compare_replicas, weights_digest
from flame_ext.seeding.read import logged_progress, read_weights
from flame_ext.seeding.report import REPORT_NAME, SeedReport
from flame_ext.seeding.sources.hub import locate
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.source import Source, dtype_name
from flame_ext.seeding.target import SeedTarget
from flame_ext.seeding.vocabulary import Growth, growth_of, of_source


def seed(target: SeedTarget, path: str, options: Seed, probe: Probe, report_folder: Path) -> SeedReport:
    """Load the weights at ``path`` into ``target``, initialise new parameters, prove the result and report it. Collective.

    Headers are checked before a weight is read, and no file is written before the proofs. Raises SeedError on all ranks alike.
    """
    model = target.model
    folder, revision = locate(path, options.allow_pickle, with_tokenizer=options.resize_vocabulary)
    begin = time.perf_counter()
    with failing_together(SeedError):
        source, keys, differences, growth = match(target, folder, options)
    grown = {} if growth is None else growth.shapes
    rows = hashlib.sha256(repr(growth).encode()).hexdigest()  # which tokenizers decide on
    digests = gathered((source.digest, rows))
    for rank, other in enumerate(digests):
        if other != digests[0]:
            seen = "files" if other[0] != digests[0][0] else "tokenizers (there, or at model.hf_assets_path)"
            raise SeedError(f"rank {rank} sees other {seen} at {path} than rank 0; give all nodes the same copy")
    for line in source.passed_over:
        logger.info(f"Passed over in {folder}: {line}")
    for line in differences:
        logger.warning(f"The configurations differ, as seed.allow_config_difference permits: {line}")
    _log_casts(target, source, keys)
    with failing_together(SeedError):
        finite = options.verify != "none"
        nbytes = read_weights(source, target.state, model.tied_keys, finite, logged_progress(), grown)
        new = {key: target.state[key] for key in keys.initialised if key in target.state}
        initialise(new, model.parameter_inits, options.rng_seed)
        if growth is not None:
            deviation = getattr(target.config.get_text_config(), "initializer_range", 0.02)  # as transformers
            inits = model.parameter_inits, deviation, options.rng_seed
            fill_new_rows(source, target.state, model.tied_keys, growth, *inits)
    figures = gathered((time.perf_counter() - begin, nbytes))
    total_bytes, (seconds, slowest) = sum(n for _, n in figures), max((s, rank) for rank, (s, _) in enumerate(figures))
    frozen = [key for key in keys.loaded if key in model.whole.frozen]
    elements = sum(math.prod(grown.get(key, target.whole[key].shape)) for key in keys.loaded)
    logger.info(
        f"Seeded from {path} ({source.layout}): {len(keys.loaded)} tensors ({elements:,} elements) loaded, "
        f"{len(keys.initialised)} initialised from rng_seed {options.rng_seed}, {len(keys.tied)} tied, "
        f"{len(keys.buffers)} buffers computed, {len(keys.ignored)} source keys ignored, {len(frozen)} frozen; "
        f"{total_bytes / 2**20:,.1f} MiB in {seconds:.2f} s ({total_bytes / 2**20 / seconds:,.0f} MiB/s, slowest: rank {slowest})"
    )
    if growth is not None:
        logger.info(f"Vocabulary: {growth}")
        probe = replace(probe, tokens=probe.tokens % growth.loaded, vocab_size=growth.loaded, growth=growth)
    parts = compare_replicas(target.state, target.whole, target.part)
    digest = weights_digest(parts, target.whole, keys.loaded)
    kept = weights_digest(parts, target.whole, frozen) if model.whole.adapters is not None else None
    backbone = {*target.whole, *model.tied_keys} - {*model.parameter_inits}
    rules, trust = parse_key_map(options.key_map), options.trust_remote_code
    config = target.config if growth is None else of_source(target.config, growth)
    reference = Reference(source, config, backbone, trust, rules)
    verification = verify(options.verify, probe, reference.logits, folder)
    proved = [] if options.verify == "none" else prove_attention(probe)
    read = path, source.layout, keys, total_bytes, seconds, len(figures), source.digest
    record = None if growth is None else growth.record
    report = SeedReport(*read, verification, revision, digest, differences, record, frozen, kept)
    with failing_together(SeedError):
        if is_main_rank():
            write_json(report_folder / REPORT_NAME, report.fields)
    verified = "Did not verify" if options.verify == "none" else "Verified"
    logger.info(f"{verified} the seeded model ({verification}); recorded in {report_folder / REPORT_NAME}")
    for what in proved:
        logger.info(f"Verified that {what}")
    return report


def match(target: SeedTarget, folder: Path, options: Seed) -> tuple[Source, Account, list[str], Growth | None]:
    """Return the source under the model's names, the account of every key, the configurations' differences that are allowed, and
    what the vocabulary grows by.

    Reads headers alone. Raises SeedError if the source does not fit the model.
    """
    source = renamed(open_source(folder, options.allow_pickle, options.follow_links), parse_key_map(options.key_map))
    source = in_model_names(source, target.names)
    differences: list[str] = []
    if (folder / "config.json").exists():  # not every DCP checkpoint has one
        allowed = options.allow_config_difference
        differences = require_same_function(source, target.config, options.trust_remote_code, allowed)
    model = target.model
    growth = growth_of(target, source, options)
    needed = target.whole, model.tied_keys, model.computed_buffers, model.parameter_inits
    ignored, growing = options.ignore_source_keys, {} if growth is None else growth.shapes
    adapters = () if model.whole.adapters is None else model.whole.adapters.keys
    keys = account(*needed, source, [*options.new_parameters, *adapters], ignored, model.vocabulary_keys, growing)
    _require_frozen(target, keys, source, growth)
    return source, keys, differences, growth


def _require_frozen(target: SeedTarget, keys: Account, source: Source, growth: Growth | None) -> None:
    """Raises the SeedError of a parameter that is to stay as the source has it, but is not there, or lacks rows of tokens."""
    frozen = target.model.whole.frozen
    if missing := [key for key in keys.initialised if key in frozen]:
        option = frozen[missing[0]]
        narrower = " or narrow the pattern," if option == FREEZE else ""
        raise SeedError(
            f"{source.path}: {option} keeps a head as the source has it, but {missing[0]!r} is not there: start from an export "
            f"of a run that trained the head (checkpoint.initial_load_path = 'RUN/hf/step-N'),{narrower} or drop {option}"
        )
    if growth is not None and growth.new_tokens and (grown := [key for key in growth.shapes if key in frozen]):
        raise SeedError(
            f"{source.path}: {frozen[grown[0]]} keeps {grown[0]!r} as the source has it, which lacks the rows of {growth.new_tokens} "
            "tokens (seed.resize_vocabulary), and nothing would train them: train the embeddings, or take the source's tokenizer"
        )


def _log_casts(target: SeedTarget, source: Source, keys: Account) -> None:
    loaded, tied = {*keys.loaded}, target.model.tied_keys
    found = [(tied.get(name, name), entry.dtype) for name, entry in source.entries.items()]
    casts = Counter((dtype, target.whole[key].dtype) for key, dtype in found if key in loaded)
    for (dtype, needed), n in sorted(casts.items(), key=str):
        if dtype != needed:
            dtypes = f"{dtype_name(dtype)} in the files, {dtype_name(needed)} in the model"
            logger.info(f"Casting {n} tensors while reading: {dtypes}")

"""All that this package takes from torchtitan 0.2.2 that is private, patched, or elsewhere in 0.3: what a port replaces.

Private is also a class whose methods with a leading underscore are overridden. What 0.3 has in the same place (``logger``,
``ParallelDims``, ``set_default_dtype``, …) is imported from torchtitan directly. Of that, ``MetricsProcessor``,
``BaseValidator``, ``StateDictAdapter`` and ``OptimizersContainer`` are made from other arguments there.

0.3.0rc1 has no TOML, TrainSpec and ModelConverter: a function in Python returns a ``Trainer.Config``, and each component
is built by the ``Config`` inside its class. Names are indented under their module; the second column has the modules that
use a name, and what for; "patched" means replaced for a time. tests/host/test_table.py compares the table with the code.

=================================  ======================================  ===============================================
name in 0.2.2                      used in: for                            in 0.3.0rc1
=================================  ======================================  ===============================================
torchtitan.train
  Trainer                          trainer: its base,                      moved to torchtitan.trainer
                                   planning.rehearsal: without lock
  CheckpointManager                host.patches: patched with ours         ``Trainer.Config.checkpoint`` names the class
  ensure_pp_loss_visible           host.patches: patched, wrong here       the same, in torchtitan.trainer
torchtitan.tools
  utils                            host.device: patched on a CPU           the same
torchtitan.config
  ConfigManager                    config.manager: its base                other methods; no TOML
  JobConfig                        config.manager, config.sections,        gone: ``Trainer.Config``
                                   host.high_precision,
                                   preflight.reference: all options
  LRScheduler                      run.optimization: type of a section     gone: ``LRSchedulersContainer.Config``
  job_config                       config.sections: bases of sections      gone: ``config.configs``, and each ``Config``
torchtitan.config.job_config
  Compile                          model.parallelize: type of a section    ``config.CompileConfig``
  DataLoader                       preflight.options: type of a section    ``ParallelAwareDataloader.Config``
  Parallelism                      model.pipeline_stages: the same         ``config.ParallelismConfig``
torchtitan.protocols
  BaseModelArgs                    model.hf_causal_lm: its base,           gone: ``BaseModel.Config``
                                   model.pipeline: type
torchtitan.protocols.train_spec
  ParallelizeFunction              model.pipeline: type                    moved to ``protocols.model_spec``
  TrainSpec                        assembly: parts of a run                gone: ``ModelSpec`` and ``Trainer.Config``
  register_train_spec              assembly: ``model.name``,               gone: ``--module`` names a module
                                   planning.rehearsal: one without data
torchtitan.protocols.model_converter
  _registry_model_converter_cls    assembly, preflight.model,              gone: ``ModelConfigConverter``, which changes
                                   preflight.quantized: all converters,    the configuration of a model, not the model
                                   to wrap the one to float8
  register_model_converter         assembly: attaches heads                the same
torchtitan.components.checkpoint
  CheckpointManager                checkpoint.manager: its base            moved to ``components.checkpointer``; others of
                                                                           its methods are private
  ModelWrapper                     checkpoint.manager: ties                moved to ``components.checkpointer``
torchtitan.components.tokenizer
  HuggingFaceTokenizer             data.tokenizer: its base                path by keyword; ``config`` is ``_hf_config``
torchtitan.components.metrics
  _get_metrics_rank                run.metrics: the rank that logs         takes ``pp_schedule`` for the configuration
torchtitan.components.lr_scheduler
  LRSchedulersContainer            run.optimization: its base              moved to ``components.optimizer``
  build_lr_schedulers              run.optimization: schedules             gone: ``LRSchedulersContainer.Config``
torchtitan.components.optimizer
  OptimizersInBackwardContainer    run.optimization: its base              gone, with the option
  build_optimizers                 run.optimization: optimizers            gone: ``OptimizersContainer.Config``
torchtitan.distributed.activation_checkpoint
  apply_ac                         model.parallelize                       gone: ``ActivationCheckpointing.apply``
torchtitan.distributed.pipeline_parallel
  build_pipeline_schedule          model.pipeline                          private, other arguments
  generate_llm_fqn_per_model_part  model.pipeline_stages: layers           private
torchtitan.distributed.tensor_parallel
  maybe_enable_async_tp            model.parallelize                       private, in ``distributed.compile``
torchtitan.models.llama3.infra.parallelize
  _op_sac_save_list                model.parallelize: operators that       ``activation_checkpoint._get_default_save_ops``
                                   selective checkpointing keeps
  apply_compile                    model.parallelize: each layer           moved to ``distributed.compile``
  apply_ddp                        model.parallelize                       gone
  disable_fsdp_gradient_division   model.parallelize: sums, no means       moved to ``distributed.fsdp``
=================================  ======================================  ===============================================

Private or patched outside torchtitan: ``torch._utils`` (device), ``torch.profiler.profile`` (patches; 0.3 does not need it),
``torch._dynamo.config`` and ``ProcessGroupGloo`` (patches), the ``forward`` of torchao's layers (high_precision).
"""

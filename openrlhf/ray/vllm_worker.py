"""What runs inside a vLLM worker process: new weights for a model that is already serving.

vLLM mixes :class:`WeightReloader` into its own worker class (``worker_extension_cls``), so ``self`` has vLLM's
``vllm_config``, ``model_config`` and ``model_runner``.
"""

from __future__ import annotations

from torch import nn

from openrlhf.rollout.weights import Weights


class WeightReloader:
    """Adds an update of all weights, bucket by bucket, to a vLLM worker; called through ``LLM.collective_rpc``.

    A layer is put in place as soon as all its weights are there; what has come of it until then is kept.
    """

    def begin_weights(self) -> None:
        """Await all weights anew."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())

    def take_weights(self, bucket: Weights) -> None:
        """Load some weights, which carry the names of the Hugging Face checkpoint; a tied head may be left out."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(bucket)

    def end_weights(self, repack_tied_head: bool) -> None:
        """Put what has come in place.

        Args:
            repack_tied_head: see :func:`repack_tied_heads`; off only to show what happens without it.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.model_config)
        if repack_tied_head and self.model_config.hf_text_config.tie_word_embeddings:
            repack_tied_heads(model)


def repack_tied_heads(model: nn.Module) -> int:
    """Make tied output heads read the embedding again and return how many there were.

    vLLM packs the head's weights into a layout of their own when it loads a model on a CPU. A tied head has no weights
    in the checkpoint, so a reload leaves that copy as it was: the model embeds with the new weights and reads out with
    the old ones, without an error.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    modules = list(model.modules())
    heads = [module for module in modules if isinstance(module, ParallelLMHead)]
    tables = [m for m in modules if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)]
    for head in heads:
        table = next((table for table in tables if table.weight.shape == head.weight.shape), None)
        if table is not None:
            head.weight = table.weight
            head.quant_method.process_weights_after_loading(head)
    return len(heads)

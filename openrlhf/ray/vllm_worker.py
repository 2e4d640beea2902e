"""What runs inside a vLLM worker process: new weights for a model that is already serving.

vLLM mixes :class:`WeightReloader` into its own worker class (``worker_extension_cls``), so ``self`` has vLLM's
``reload_weights`` and ``model_runner``.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class WeightReloader:
    """Adds ``load_policy_weights`` to a vLLM worker; called through ``LLM.collective_rpc``."""

    def load_policy_weights(self, weights: Iterable[tuple[str, Tensor]], repack_tied_head: bool = True) -> None:
        """Replace every weight by ``weights``, which carry the names of the Hugging Face checkpoint.

        Args:
            weights: the whole model; a tied head may be left out or sent once more.
            repack_tied_head: see :func:`repack_tied_heads`; off only to show what happens without it.
        """
        self.reload_weights(weights_iterator=iter(weights))
        if repack_tied_head and self.model_config.hf_text_config.tie_word_embeddings:
            repack_tied_heads(self.model_runner.get_model())


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

"""Add a rival: a memory of one row that sums up the last segment, tried on a tiny random model.

python examples/add_a_rival.py
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from transformerfam.rivals import RivalConfig, attach
from transformerfam.rivals.lanes import Lane
from transformerfam.rivals.rival import Rival, RivalPiece


class Summary(Rival):
    """Let one learned row see a whole segment, and put what it became in front of the next segment."""

    names_of_rows = ("query",)

    def build(self, model: PreTrainedModel) -> None:
        """Make the new parameters."""
        self.query = nn.Parameter(0.02 * torch.randn(1, self.hidden_size))

    def initial_memory(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Return what is known before the first segment: zeros, (B, 1, D)."""
        return {"summary": self.zeros(batch_size, 1, self.hidden_size)}

    def rows_in_front(self, lane: Lane) -> torch.Tensor:
        """Return the row that the segment's tokens see."""
        return lane.memory["summary"]

    def rows_behind(self, lane: Lane) -> torch.Tensor:
        """Return the row that sees the whole segment."""
        return self.query.expand(len(lane.rows), -1, -1)

    def end_segment(self, piece: RivalPiece, hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the memory of the next segment."""
        return {"summary": hidden_BTD[:, -1:]}


def main() -> None:
    """Read a text with it, in any split, and let a gradient go back through all segments."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
    attach(model, RivalConfig(system="rmt", block_size=8), kind=Summary)  # "rmt": a name until it has its own

    ids = torch.randint(50, (1, 100))
    whole, split = model.read(ids), model.read(ids[:, 37:], model.read(ids[:, :37]))
    torch.testing.assert_close(whole.lanes[0].memory["summary"], split.lanes[0].memory["summary"])
    print(f"state {whole.num_bytes:,} bytes after {whole.num_tokens_read} tokens, the same in any split")

    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits[0, -1].sum().backward()
    print(f"gradient of the last token at the first of 13 segments: {embeddings.grad[0, 0].norm():.1e}")


if __name__ == "__main__":
    main()

"""
python tests/bench_train.py [--device cuda] [--steps 8]

What a training step costs: `gpt-s` against a nanoGPT-shaped model of the same width, depth and vocabulary (learned
positions, LayerNorm with gain, GELU, biases off, SDPA; written for this file), and `hybrid` against `gpt-s`. Batch 8 x
512, forward + backward + AdamW, fp32. The three take turns, one step each, and a ratio is the median over the turns:
a machine that slows down slows all of them.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import CODEBOOK_SIZE, PRESETS, HybridGPT


class NanoBlock(nn.Module):
    def __init__(self, d, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.qkv, self.proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for t in self.qkv(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class NanoGPT(nn.Module):
    """Token embedding + learned positions, blocks, final LayerNorm, head tied to the embedding as in nanoGPT."""

    def __init__(self, d=256, n_layer=4, n_head=4, context=512):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(CODEBOOK_SIZE + 1, d), nn.Embedding(context, d)
        self.blocks = nn.ModuleList(NanoBlock(d, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(d, bias=False)

    def forward(self, codes, mel, targets):
        x = self.tokens(codes[:, 0]) + self.positions(torch.arange(codes.shape[2], device=codes.device))
        for block in self.blocks:
            x = block(x)
        logits = self.ln_f(x) @ self.tokens.weight[:CODEBOOK_SIZE].T
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def main():
    parser = argparse.ArgumentParser(description="Time training steps, one model after the other.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=8, help="turns that count, after two that do not")
    args = parser.parse_args()
    torch.manual_seed(0)
    codes = torch.randint(CODEBOOK_SIZE, (8, 1, 512), device=args.device)
    mel = torch.randn(8, 512, 80, device=args.device)
    targets = torch.randint(CODEBOOK_SIZE, (8, 1, 512), device=args.device)
    models = {"nanoGPT-shaped": NanoGPT(), "gpt-s": HybridGPT(PRESETS["gpt-s"]), "hybrid": HybridGPT(PRESETS["hybrid"])}
    optimizers = {}
    for name, model in models.items():
        optimizers[name] = torch.optim.AdamW(model.to(args.device).parameters(), lr=1e-4, fused=True)

    seconds = {name: [] for name in models}
    for turn in range(args.steps + 2):
        for name, model in models.items():
            if args.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            _, loss = model(codes, mel, targets)
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if args.device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    times = {name: torch.tensor(s) for name, s in seconds.items()}
    for name, t in times.items():
        print(f"{name:15s} {sum(p.numel() for p in models[name].parameters()):>10,} parameters  "
              f"{1000 * t.median():7.1f} ms a step  {8 * 512 / t.median():9,.0f} tokens/s")
    print(f"gpt-s tokens/s over nanoGPT-shaped: {(times['nanoGPT-shaped'] / times['gpt-s']).median():.3f}")
    print(f"hybrid step over gpt-s step:        {(times['hybrid'] / times['gpt-s']).median():.3f}")


if __name__ == "__main__":
    main()

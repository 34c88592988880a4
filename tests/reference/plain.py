"""Plain, slow, obviously right: one prompt at a time, the whole network, no caches, no shared code but the tokenizer."""

import copy
import math

import torch


def encode(lm, prompt, target=""):
    """Tokens of a prompt and a target after one space; and how many belong to the prompt. Byte-level tokenizers only."""
    text = f"{prompt} {target}" if target else prompt
    ids = lm.tokenizer(text)["input_ids"]
    return torch.tensor([ids]), len(lm.tokenizer(prompt)["input_ids"])


def subject_end(lm, prompt, subject):
    """The last token of the subject, in a tokenizer of bytes with one token in front."""
    return len(prompt[: prompt.rindex(subject) + len(subject)].encode())


def target_logprobs(model, ids, n_prompt):
    """`log p(o_t | p, o_<t)` for each target token."""
    logprobs = model(ids).logits[0].float().log_softmax(-1)
    return torch.stack([logprobs[i - 1, ids[0, i]] for i in range(n_prompt, ids.shape[1])])


def ft_l_loss(model, lm, edits):
    """Every target token predicted from the prompt's last position; sum over tokens, mean over edits."""
    losses = []
    for edit in edits:
        ids, n = encode(lm, edit.prompt, edit.target)
        logprobs = model(ids[:, :n]).logits[0, -1].float().log_softmax(-1)
        losses.append(-sum(logprobs[token] for token in ids[0, n:]))
    return sum(losses) / len(losses)


def ft_m_loss(model, lm, edits):
    """Mean over the target's tokens, mean over edits."""
    losses = []
    for edit in edits:
        ids, n = encode(lm, edit.prompt, edit.target)
        losses.append(-target_logprobs(model, ids, n).mean())
    return sum(losses) / len(losses)


def fine_tune(lm, parameter, loss_of, edits, *, lr, steps, clamp=None):
    """Plain Adam on one parameter of a copy of the model; the change of that parameter."""
    model = copy.deepcopy(lm.model).eval()
    for p in model.parameters():
        p.requires_grad = False
    weight = model.get_parameter(parameter)
    weight.requires_grad = True
    old = weight.detach().clone()
    optimiser = torch.optim.Adam([weight], lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of(model, lm, edits).backward()
        optimiser.step()
        if clamp is not None:
            with torch.no_grad():
                weight.copy_(torch.maximum(torch.minimum(weight, old + clamp), old - clamp))
    return weight.detach() - old


def second_moment(lm, module, texts):
    """`E[k k^T]`, one token at a time, in float64."""
    keys = []
    handle = module.register_forward_pre_hook(lambda _, args: keys.extend(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for text in texts:
            lm.model(torch.tensor([list(text)]))
    handle.remove()
    return sum(torch.outer(k.double(), k.double()) for k in keys) / len(keys)


def rank_one_insert(W, k, v, C, direction=None):
    """ROME, equation 2: `W + (v - W k) (C^-1 d)^T / ((C^-1 d) . k)`, float64, `d = k` unless given."""
    W, k, v, C = W.double(), k.double(), v.double(), C.double()
    u = torch.linalg.inv(C) @ (k if direction is None else direction.double())
    return W + torch.outer(v - W @ k, u) / (u @ k)


def optimise_value(lm, module, edit, prefixes, *, lr, steps, kl_factor, weight_decay, clamp, beside=()):
    """ROME, equation 4, in the form of its release; returns the old output of `module` and the change.

    One prompt at a time through the whole model. Modules in `beside` get changes of their own.
    """
    texts = [(prefix + edit.prompt, edit.target) for prefix in prefixes]
    essence = f"{edit.subject} is a"
    modules = [module, *beside]
    at_bare, length = subject_end(lm, edit.prompt, edit.subject), encode(lm, edit.prompt)[0].shape[1]
    old = [output_at(lm.model, m, encode(lm, edit.prompt)[0], at_bare).float() for m in modules]
    assert length > at_bare
    with torch.no_grad():
        plain = lm.model(encode(lm, essence)[0]).logits[0, -1].float().log_softmax(-1)
    deltas = [torch.zeros_like(value, requires_grad=True) for value in old]
    optimiser = torch.optim.Adam(deltas, lr=lr)

    def with_deltas(ids, at):
        def adding(delta):
            def add(_, __, out):
                hidden = out[0] if isinstance(out, tuple) else out
                grid = hidden.reshape(1, ids.shape[1], -1).clone()
                grid[0, at] += delta
                grid = grid.reshape(hidden.shape)
                return (grid, *out[1:]) if isinstance(out, tuple) else grid

            return add

        hooks = [m.register_forward_hook(adding(delta)) for m, delta in zip(modules, deltas, strict=True)]
        logits = lm.model(ids).logits[0].float()
        for hook in hooks:
            hook.remove()
        return logits.log_softmax(-1)

    for _ in range(steps - 1):  # the last of `steps` evaluations only measures the loss
        nll = 0.0
        for prompt, target in texts:
            ids, n = encode(lm, prompt, target)
            logprobs = with_deltas(ids, subject_end(lm, prompt, edit.subject))
            nll = nll - torch.stack([logprobs[i - 1, ids[0, i]] for i in range(n, ids.shape[1])]).mean() / len(texts)
        changed = with_deltas(encode(lm, essence)[0], subject_end(lm, essence, edit.subject))[-1]
        kl = (plain.exp() * (plain - changed)).sum()
        loss = nll + kl_factor * kl
        for delta, value in zip(deltas, old, strict=True):
            loss = loss + weight_decay * delta.norm() / value.norm() ** 2
        for delta, gradient in zip(deltas, torch.autograd.grad(loss, deltas), strict=True):
            delta.grad = gradient
        optimiser.step()
        with torch.no_grad():
            for delta, value in zip(deltas, old, strict=True):
                if delta.norm() > clamp * value.norm():
                    delta.mul_(clamp * value.norm() / delta.norm())
    return old[0], deltas[0].detach()


def output_at(model, module, ids, at):
    """What a module puts out at one position of one text."""
    seen = []

    def see(_, __, out):
        hidden = out[0] if isinstance(out, tuple) else out
        seen.append(hidden.detach().clone().reshape(1, ids.shape[1], -1)[0, at])

    handle = module.register_forward_hook(see)
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


def input_at(model, module, ids, at):
    """What a module reads at one position of one text."""
    seen = []
    handle = module.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().clone().reshape(1, ids.shape[1], -1)[0, at])
    )
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


def spread(lm, edits, layers, sites, prefixes, metrics, *, prior, share, **search):
    """MEMIT, algorithm 1, on the model itself, which is put back; the change of each block, in float64."""
    goals = []
    for edit in edits:
        old, delta = optimise_value(lm, sites[0], edit, prefixes, beside=sites[1:], **search)
        goals.append((old + delta).double())
    kept, changes = {}, []
    for i, layer in enumerate(layers):
        projection = lm.anatomy.mlp_out(layer)
        residuals, keys = [], []
        for edit, goal in zip(edits, goals, strict=True):
            at = subject_end(lm, edit.prompt, edit.subject)
            now = output_at(lm.model, sites[0], encode(lm, edit.prompt)[0], at).double()
            residuals.append((goal - now) * share(len(layers) - i))
            own = [
                input_at(lm.model, projection.module, encode(lm, p + edit.prompt)[0], len(p.encode()) + at).double()
                for p in prefixes
            ]
            keys.append(sum(own) / len(own))
        R, K = torch.stack(residuals, 1), torch.stack(keys, 1)
        changes.append(R @ K.T @ torch.linalg.inv(prior * metrics[i].double() + K @ K.T))
        weight = projection.module.weight
        kept[layer] = weight.data
        step = changes[-1].T if projection.transposed else changes[-1]
        weight.data = (weight.double() + step).to(weight.dtype)
    for layer, data in kept.items():
        lm.anatomy.mlp_out(layer).module.weight.data = data
    return changes


def ngram_entropy(tokens, n):
    """Shannon entropy in bits, from probabilities written out."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    shares = [grams.count(gram) / len(grams) for gram in set(grams)]
    return sum(-p * math.log2(p) for p in shares)


def rows_with_gradient(inputs, outputs):
    """`[u, δ]` of each token whose gradient is not all zero."""
    return torch.stack([torch.cat([u, d]) for u, d in zip(inputs, outputs, strict=True) if d.abs().max() > 0])


def mend_network(state, rows, number):
    """One row after the other through the two layers of MEND's network, `state` holding its tensors by name."""
    done = []
    for row in rows:
        x = (row - state["mean"]) / (state["deviation"] + 1e-7)
        for layer in ("hidden", "last"):
            own = {key.removeprefix(f"{layer}."): value for key, value in state.items() if key.startswith(layer)}
            change = own["scale"][number] * (own["outer"] @ (own["inner"] @ x) + own["bias"]) + own["shift"][number]
            x = x + (change.clamp(min=0) if layer == "hidden" else change)
        done.append(x)
    return torch.stack(done)


def editing_loss(lm, edits, shifts, *, success, locality):
    """What MEND's training lowers, with the changed weights put into the whole model functionally.

    Each edit's target after all its wordings; the divergence on the first answer of each kind of locality and on the
    next edit's prompt.
    """
    weights = dict(lm.model.named_parameters())
    changed = {name: weights[name] + shift for name, shift in shifts.items()}

    def logprobs(ids, n, parameters):
        logits = torch.func.functional_call(lm.model, parameters, (ids,)).logits[0]
        return logits.log_softmax(-1)[n - 1 : -1]

    total = 0.0
    for i, edit in enumerate(edits):
        losses = []
        for prompt in (edit.prompt, *edit.rephrases):
            ids, n = encode(lm, prompt, edit.target)
            rows = logprobs(ids, n, changed)
            losses.append(-sum(rows[t, ids[0, n + t]] for t in range(len(rows))) / len(rows))
        other = edits[(i + 1) % len(edits)]
        kept = [(group[0].prompt, group[0].answers[0]) for group in edit.locality.values() if group[0].answers]
        kept.append((other.prompt, other.ground_truth[0] if other.ground_truth else other.target))
        moved = []
        for prompt, answer in kept:
            ids, n = encode(lm, prompt, answer)
            before, after = logprobs(ids, n, {}).detach(), logprobs(ids, n, changed)
            moved += list((before.exp() * (before - after)).sum(-1))
        total = total + success * sum(losses) / len(losses) + locality * sum(moved) / len(moved)
    return total / len(edits)

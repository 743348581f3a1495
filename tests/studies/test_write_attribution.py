"""The shares of all writes are the whole, and a channel planted by one MLP is traced to it and to its gate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from dit_lens import DiTLens, Read, studies
from dit_lens.errors import OpError, SiteError
from dit_lens.studies.write_attribution import percentiles, shares
from tests import pipelines
from tests.zoo.truth import zoo_of

CHANNEL = 5


@pytest.fixture(scope="module")
def planted():
    """The MLP of block 1 writes a large constant into one channel, through a gate that is large there alone."""
    pipe = pipelines.flux()
    block = pipe.transformer.transformer_blocks[1]
    with torch.no_grad():
        block.norm1.linear.bias[5 * pipelines.WIDTH + CHANNEL] = 30.0  # the sixth part is the gate of the MLP
        block.ff.net[2].bias[CHANNEL] = 4.0
    return DiTLens(pipe, defaults=dict(pipelines.CALL))


def test_a_planted_channel_is_traced_to_its_mlp_and_gate(planted):
    result = studies.write_attribution(planted, ["a cat", "two dogs"], k=1, seeds=[0, 1])
    top = result.table[result.table["arm"] == "top"]
    assert set(top["channel"]) == {CHANNEL}
    share = result.summary[result.summary["arm"] == "top"].set_index(["block", "point"])["share"]
    assert share.loc[(1, "mlp_out")] > 0.9
    assert share.drop((1, "mlp_out")).abs().max() < 0.1
    gates = top.set_index(["block", "point"])
    assert (gates.loc[(1, "mlp.gate"), "percentile"] == 1).all()
    assert (gates.loc[(1, "mlp.gate"), "gate"] > 100).all()
    assert "blocks.1 mlp_out (" in result.notes[1].split(",")[0]
    assert "blocks.1 mlp.gate (1.00)" in result.notes[2]
    other = result.table[result.table["arm"] == "random"]
    assert CHANNEL not in set(other["channel"])
    loaded_figure = result.figure()
    assert [trace.name for trace in loaded_figure.data][:3] == ["input", "attention", "MLP"]


def test_shares_are_those_of_the_plain_reads(planted):
    result = studies.write_attribution(planted, "a cat", k=3, site="blocks.2.img", steps=slice(1, 3))
    names = ["blocks.0.img.resid_pre", "blocks.0.img.mlp_out", "blocks.2.img.attn_out", "blocks.2.img"]
    run = planted.run("a cat", [Read(names, steps=slice(1, 3))], seed=0)
    start, write, single, after = (run[name].float().mean(2)[:, 0].double().numpy() for name in names)  # [s, d]
    table = result.table[result.table["arm"] == "top"].set_index(["block", "point", "channel"])["share"]
    for c in result.table["channel"].iloc[:3]:
        energy = (after[:, c] ** 2).sum()
        assert table.loc[(0, "mlp_out", c)] == pytest.approx((write[:, c] * after[:, c]).sum() / energy, rel=1e-4)
        assert table.loc[(2, "attn_out", c)] == pytest.approx((single[:, c] * after[:, c]).sum() / energy, rel=1e-3)
        first = table[table.index.get_level_values("point") == "input"].xs(c, level="channel").item()
        assert first == pytest.approx((start[:, c] * after[:, c]).sum() / energy, rel=1e-4)
    assert result.table["block"].max() == 2


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma", "sana", "hunyuan_dit", "aura_flow", "zimage", "lumina2"])
def test_shares_are_the_whole_in_every_kind_of_family(name, monkeypatch):
    zoo = zoo_of(name)

    def embedded(prompts, reads, **call):
        """These pipelines take embeddings, which stand for the prompts here."""
        with monkeypatch.context() as patch:
            patch.delattr(zoo.lens, "run")
            return zoo.run(reads)

    monkeypatch.setattr(zoo.lens, "run", embedded, raising=False)
    result = studies.write_attribution(zoo.lens, [f"prompt {row}" for row in range(zoo.rows)], k=2)
    top = result.table[result.table["share"].notna()]
    rest = top.loc[top["point"] == "rest", "share"]
    # Skips over several blocks (Hunyuan-DiT) are written by none.
    assert rest.abs().max() < 1e-3
    assert set(top["point"]) > {"input", "rest"}
    has_gates = any("gate" in site for site in zoo.lens.sites("*"))
    assert ("percentile" in result.table) == has_gates
    assert has_gates or any("have no mod.attn.gate" in note for note in result.notes)
    assert result.figure().data


def test_a_study_is_reloaded_and_drawn_without_the_model(planted, tmp_path):
    whole = studies.write_attribution(planted, ["a cat", "two dogs"], k=2, batch_size=1)
    result = studies.write_attribution(planted, ["a cat", "two dogs"], k=2, batch_size=1, out=tmp_path / "b")
    loaded = studies.Result.load(tmp_path / "b")
    assert loaded.notes == result.notes == whole.notes
    assert np.allclose(loaded.table["share"].astype(float), whole.table["share"].astype(float), equal_nan=True)
    saved = studies.Result.load(loaded.save(tmp_path / "saved"))
    assert len(saved.figure().data) == len(whole.figure().data)


def test_mistakes_are_told_before_anything_runs(planted, monkeypatch):
    monkeypatch.setattr(DiTLens, "run", None)
    with pytest.raises(SiteError, match=r"blocks\.0\.img, .*Writes are traced from the end of one block"):
        studies.write_attribution(planted, "a cat", k=2, site="blocks.*.img")
    with pytest.raises(SiteError, match=r"means final\.img\. Writes are traced"):
        studies.write_attribution(planted, "a cat", k=2, site="final.img")
    with pytest.raises(OpError, match="k=17 leaves no control of equal size"):
        studies.write_attribution(planted, "a cat", k=17)


def test_shares_add_up_to_one_where_nothing_is_missing():
    writes = np.random.default_rng(0).normal(size=(6, 4, 9))
    final = writes.sum(0)
    assert np.allclose(shares(writes, final).sum(0), 1)
    assert np.allclose(shares(writes[:5], final).sum(0), 1 - shares(writes[5:], final)[0])
    final[:, 2] = 0
    assert (shares(writes, final)[:, 2] == 0).all()


def test_the_mean_percentile_of_one_channel_is_its_area_under_the_curve():
    values = np.random.default_rng(0).integers(0, 9, 20).astype(float)  # with ties
    for c in range(20):
        assert percentiles(values)[c] == pytest.approx(roc_auc_score(np.arange(20) == c, values))
    assert percentiles(values).mean() == pytest.approx(0.5)
    assert percentiles(np.ones(1)).tolist() == [0.0]

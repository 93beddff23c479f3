//! One decoder block, forward and backward (transformers modeling_llama.py and its mistral and qwen siblings).
//!
//! Owns the order of operations and which activations survive until the backward pass. Norm outputs and the gated
//! product are cheap and recomputed.

use super::adapter::LoraModule;
use super::context::Context;
use super::linear::{self, InputGrad, Operand};
use super::{Gradients, ModelConfig, Projection, promote};
use crate::device::{AttentionShape, Compute, PendingNorms, Tensor};
use crate::probe::{Part, Role, Site};
use crate::{Error, Result};

/// What the backward pass reads of a block's forward pass.
pub(super) struct Saved {
    h: Tensor,
    norm: Tensor,
    /// Outputs of q_proj and k_proj with their inverse norms, where heads are normed (qwen3).
    heads: Option<[(Tensor, Tensor); 2]>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Tensor,
    lse: Tensor,
    middle: Tensor,
    middle_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    /// A x per projection.
    lora: [Option<Tensor>; 7],
}

/// Bytes of a [`Saved`] per token, in f32.
pub(super) fn saved_bytes(config: &ModelConfig) -> usize {
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let heads = if config.qk_norm { q + kv } else { 0 };
    4 * (2 * config.hidden + 2 * q + 2 * kv + heads + 2 * config.intermediate)
}

/// Where a backward pass puts gradients.
pub(super) struct Sink<'a> {
    pub gradients: &'a mut Gradients,
    /// Of every matrix so far, per unit of the chunk.
    pub norms: &'a mut Vec<PendingNorms>,
}

impl Sink<'_> {
    /// Adds the gradients [units, rows, columns] of matrix `matrix`.
    pub fn add(&mut self, cx: &Context<'_>, lora: &LoraModule, matrix: usize, role: Role, units: Tensor) -> Result<()> {
        let site = Site::block(lora.layer, Part::Projection(lora.projection), role);
        if !cx.recorder.is_off() {
            let offsets: Vec<usize> = (0..=units.shape[0]).map(|u| u * units.shape[1]).collect();
            cx.recorder.measure(cx.device, site, &units, &offsets, cx.first_unit)?;
        }
        self.norms.push(self.gradients.add_units(cx.device, matrix, units, cx.first_unit)?);
        Ok(())
    }
}

fn attention_shape<'a>(cx: &'a Context<'_>, layer: usize) -> AttentionShape<'a> {
    let config = cx.config;
    AttentionShape {
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        // LlamaAttention.scaling: head_dim ** -0.5 in Python's f64.
        scale: (config.head_dim as f64).powf(-0.5) as f32,
        window: config.windows[layer],
        padded: cx.padded,
        grouped: &cx.grouped,
    }
}

fn attention_compute(cx: &Context<'_>) -> Compute {
    // PyTorch's attention kernels multiply f32 operands in f32 whatever the TF32 switch says.
    Compute::of(cx.plan.linear())
}

fn norm(cx: &Context<'_>, x: &Tensor, w: &Tensor) -> Result<(Tensor, Tensor)> {
    let out = promote(x.dtype, cx.plan.norm_weight());
    cx.device.rms_norm(x, w, cx.config.rms_eps, out)
}

/// h [n, hidden] → (the block's output [n, hidden], what the backward pass needs).
pub(super) fn forward(cx: &Context<'_>, layer: usize, h: &Tensor) -> Result<(Tensor, Saved)> {
    use Projection::{Down, Gate, K, O, Q, Up, V};
    let weights = &cx.held.layers[layer];
    let site = |part| Site::block(layer, part, Role::Output);
    let (x, h_norm) = norm(cx, h, &weights.input_norm)?;
    let x = Operand::new(cx, cx.observe(site(Part::InputNorm), x)?)?;
    let (q, lora_q) = linear::forward(cx, layer, Q, &x)?;
    let (k, lora_k) = linear::forward(cx, layer, K, &x)?;
    let (v, lora_v) = linear::forward(cx, layer, V, &x)?;
    drop(x);
    let ((q, k), heads) = rotate(cx, layer, q, k)?;
    let shape = attention_shape(cx, layer);
    let (attention, lse) = cx.device.attention(&q, &k, &v, &cx.batch.rows, &shape, attention_compute(cx))?;
    let attention = cx.observe(site(Part::Attention), attention)?;
    let (o, lora_o) = linear::forward(cx, layer, O, &Operand::new(cx, attention.clone())?)?;
    let middle = cx.device.add(h, &o, promote(h.dtype, o.dtype))?;
    let middle = cx.observe(site(Part::AttentionResidual), middle)?;

    let (x, middle_norm) = norm(cx, &middle, &weights.post_norm)?;
    let x = Operand::new(cx, cx.observe(site(Part::PostAttentionNorm), x)?)?;
    let (gate, lora_gate) = linear::forward(cx, layer, Gate, &x)?;
    let (up, lora_up) = linear::forward(cx, layer, Up, &x)?;
    drop(x);
    let gated = cx.observe(site(Part::Gated), cx.device.gate(&gate, &up)?)?;
    let (down, lora_down) = linear::forward(cx, layer, Down, &Operand::new(cx, gated)?)?;
    let out = cx.device.add(&middle, &down, promote(middle.dtype, down.dtype))?;
    let out = cx.observe(site(Part::Residual), out)?;
    let lora = [lora_q, lora_k, lora_v, lora_o, lora_gate, lora_up, lora_down];
    let h = h.clone();
    Ok((out, Saved { h, norm: h_norm, heads, q, k, v, attention, lse, middle, middle_norm, gate, up, lora }))
}

/// Inputs and inverse norms of q's and k's head norms.
type HeadNorms = Option<[(Tensor, Tensor); 2]>;

/// Per-head norms and rotary embedding: outputs of q_proj and k_proj → q and k as attention reads them.
fn rotate(cx: &Context<'_>, layer: usize, q: Tensor, k: Tensor) -> Result<((Tensor, Tensor), HeadNorms)> {
    let turn = |x: &Tensor, heads: usize, part: Part| {
        // q · cos promotes (bf16 q with f32 tables gives f32). Attention rounds its operands to its own arithmetic;
        // keys are repeated over their group, and their gradient summed, in this dtype.
        let out = promote(x.dtype, cx.plan.residual());
        let tables = cx.rope;
        let y = cx.device.rope(x, &cx.batch.positions, &tables.cos, &tables.sin, heads, false, out)?;
        cx.observe(Site::block(layer, part, Role::Output), y)
    };
    let (heads, kv_heads) = (cx.config.heads, cx.config.kv_heads);
    let Some((q_weight, k_weight)) = &cx.held.layers[layer].head_norms else {
        return Ok(((turn(&q, heads, Part::RotatedQ)?, turn(&k, kv_heads, Part::RotatedK)?), None));
    };
    let (q_out, q_norm) = norm(cx, &by_head(&q, cx.config.head_dim), q_weight)?;
    let (k_out, k_norm) = norm(cx, &by_head(&k, cx.config.head_dim), k_weight)?;
    let q_out = turn(&shaped_like(q_out, &q), heads, Part::RotatedQ)?;
    let k_out = turn(&shaped_like(k_out, &k), kv_heads, Part::RotatedK)?;
    Ok(((q_out, k_out), Some([(q, q_norm), (k, k_norm)])))
}

/// [n, heads · head_dim] seen as [n · heads, head_dim].
fn by_head(x: &Tensor, head_dim: usize) -> Tensor {
    Tensor { shape: vec![x.elements() / head_dim, head_dim], ..x.clone() }
}

fn shaped_like(x: Tensor, like: &Tensor) -> Tensor {
    Tensor { shape: like.shape.clone(), ..x }
}

/// Gradient of the block's output → gradient of its input, unless `input_grad` is false. LoRA gradients go to
/// `sink`.
pub(super) fn backward(
    cx: &Context<'_>,
    layer: usize,
    d_out: Tensor,
    saved: Saved,
    sink: &mut Sink<'_>,
    input_grad: bool,
) -> Result<Option<Tensor>> {
    let [lora_q, lora_k, lora_v, lora_o, lora_gate, lora_up, lora_down] = saved.lora;
    let d_out = cx.observe(Site::block(layer, Part::Residual, Role::OutputGrad), d_out)?;
    let mlp = Mlp { h: &saved.middle, norm: &saved.middle_norm, gate: saved.gate, up: saved.up };
    let d_middle = mlp_backward(cx, layer, d_out, mlp, [lora_gate, lora_up, lora_down], sink)?;

    let mut d_attention = InputGrad::until(Projection::O);
    let d_o = cx.cast(&d_middle, cx.plan.linear())?;
    let x = Operand::new(cx, saved.attention.clone())?;
    linear::backward(cx, (layer, Projection::O), d_o, &x, lora_o, &mut d_attention, sink)?;
    drop(x);
    let Some(d_attention) = d_attention.finish() else { return Ok(None) };
    let d_attention = cx.observe(Site::block(layer, Part::Attention, Role::OutputGrad), d_attention)?;
    let shape = attention_shape(cx, layer);
    let (dq, dk, dv) = cx.device.attention_grad(
        &d_attention,
        &saved.q,
        &saved.k,
        &saved.v,
        &saved.attention,
        &saved.lse,
        &cx.batch.rows,
        &shape,
        attention_compute(cx),
    )?;
    let (dq, dk) = rotate_backward(cx, layer, dq, dk, saved.heads.as_ref())?;

    let x = Operand::new(cx, cx.unmeasured(|| norm(cx, &saved.h, &cx.held.layers[layer].input_norm))?.0)?;
    let mut dx = InputGrad::until(Projection::Q).wanted(input_grad);
    // Autograd runs the youngest operation first: v, k, q.
    linear::backward(cx, (layer, Projection::V), dv, &x, lora_v, &mut dx, sink)?;
    linear::backward(cx, (layer, Projection::K), dk, &x, lora_k, &mut dx, sink)?;
    linear::backward(cx, (layer, Projection::Q), dq, &x, lora_q, &mut dx, sink)?;
    let Some(dx) = dx.finish() else { return Ok(None) };
    let dx = cx.observe(Site::block(layer, Part::InputNorm, Role::OutputGrad), dx)?;
    let normed = Normed { h: &saved.h, weight: &cx.held.layers[layer].input_norm, r: &saved.norm };
    residual_backward(cx, &normed, &d_middle, &dx).map(Some)
}

/// What [`mlp_backward`] reads of the forward pass.
struct Mlp<'a> {
    h: &'a Tensor,
    norm: &'a Tensor,
    gate: Tensor,
    up: Tensor,
}

/// Gradient of the block's output → gradient of the residual stream between attention and MLP.
fn mlp_backward(
    cx: &Context<'_>,
    layer: usize,
    d_out: Tensor,
    mlp: Mlp<'_>,
    [lora_gate, lora_up, lora_down]: [Option<Tensor>; 3],
    sink: &mut Sink<'_>,
) -> Result<Tensor> {
    let Mlp { h, norm: r, gate, up } = mlp;
    let gated = Operand::new(cx, cx.unmeasured(|| cx.device.gate(&gate, &up))?)?;
    let mut d_gated = InputGrad::until(Projection::Down);
    let d_down = cx.cast(&d_out, cx.plan.linear())?;
    linear::backward(cx, (layer, Projection::Down), d_down, &gated, lora_down, &mut d_gated, sink)?;
    drop(gated);
    let d_gated = d_gated.finish().ok_or_else(|| Error::internal("down_proj gave no input gradient"))?;
    let d_gated = cx.observe(Site::block(layer, Part::Gated, Role::OutputGrad), d_gated)?;
    let (d_gate, d_up) = cx.device.gate_grad(&d_gated, &gate, &up)?;
    drop((gate, up, d_gated));
    let weight = &cx.held.layers[layer].post_norm;
    let x = Operand::new(cx, cx.unmeasured(|| norm(cx, h, weight))?.0)?;
    let mut dx = InputGrad::until(Projection::Gate);
    // up_proj was recorded after gate_proj, so its gradients arrive first.
    linear::backward(cx, (layer, Projection::Up), d_up, &x, lora_up, &mut dx, sink)?;
    linear::backward(cx, (layer, Projection::Gate), d_gate, &x, lora_gate, &mut dx, sink)?;
    let dx = dx.finish().ok_or_else(|| Error::internal("gate_proj gave no input gradient"))?;
    let dx = cx.observe(Site::block(layer, Part::PostAttentionNorm, Role::OutputGrad), dx)?;
    residual_backward(cx, &Normed { h, weight, r }, &d_out, &dx)
}

/// A residual stream, the weight of the norm on it, and its inverse norms.
struct Normed<'a> {
    h: &'a Tensor,
    weight: &'a Tensor,
    r: &'a Tensor,
}

/// Gradient of a residual stream h: that of the stream above plus that through the norm, in h's dtype.
fn residual_backward(cx: &Context<'_>, x: &Normed<'_>, d_above: &Tensor, d_norm: &Tensor) -> Result<Tensor> {
    cx.device.rms_norm_grad(d_norm, x.h, x.weight, x.r, Some(&cx.cast(d_above, x.h.dtype)?))
}

/// Gradients of q and k as attention read them → gradients of the outputs of q_proj and k_proj.
fn rotate_backward(
    cx: &Context<'_>,
    layer: usize,
    dq: Tensor,
    dk: Tensor,
    heads: Option<&[(Tensor, Tensor); 2]>,
) -> Result<(Tensor, Tensor)> {
    // Each product of the rotation rounds to the dtype of its input: the linear's output, or the head norm's.
    let out = match heads {
        None => cx.plan.linear(),
        Some(_) => promote(cx.plan.linear(), cx.plan.norm_weight()),
    };
    let back = |d: &Tensor, heads: usize, part: Part| {
        let d = cx.observe(Site::block(layer, part, Role::OutputGrad), d.clone())?;
        let tables = cx.rope;
        cx.device.rope(&d, &cx.batch.positions, &tables.cos, &tables.sin, heads, true, out)
    };
    let dq = back(&dq, cx.config.heads, Part::RotatedQ)?;
    let dk = back(&dk, cx.config.kv_heads, Part::RotatedK)?;
    let (Some([(q, q_norm), (k, k_norm)]), Some((q_weight, k_weight))) = (heads, &cx.held.layers[layer].head_norms)
    else {
        return Ok((dq, dk));
    };
    let head_dim = cx.config.head_dim;
    let grad = |d: &Tensor, x: &Tensor, weight: &Tensor, r: &Tensor| {
        cx.device
            .rms_norm_grad(&by_head(d, head_dim), &by_head(x, head_dim), weight, r, None)
            .map(|g| shaped_like(g, x))
    };
    Ok((grad(&dq, q, q_weight, q_norm)?, grad(&dk, k, k_weight, k_norm)?))
}

//! One linear of a block with its LoRA branch, forward and backward.
//!
//! PEFT's lora.Linear.forward: `result = base(x) + B(A(dropout(x.to(adapter)))) * scaling`, cast back to the base
//! output's dtype. Each operation rounds where PyTorch's does; see [`super::PrecisionPlan`].

use super::Projection;
use super::adapter::LoraModule;
use super::block::Sink;
use super::context::Context;
use super::held::Linear;
use crate::Result;
use crate::device::{DType, LowRank, Tensor};
use crate::probe::{Part, Role, Site};

/// An input of linears, rounded once for all of them.
pub(super) struct Operand {
    /// As the layer before produced it; its gradient has this dtype.
    raw: Tensor,
    /// As frozen linears read it.
    linear: Tensor,
    /// As LoRA branches read it, dropout aside.
    branch: Tensor,
}

impl Operand {
    pub fn new(cx: &Context<'_>, raw: Tensor) -> Result<Self> {
        let linear = cx.cast(&raw, cx.plan.linear())?;
        let branch = match cx.plan.branch() {
            // Widening is exact and happens in the product.
            DType::F32 => raw.clone(),
            dtype if dtype == cx.plan.linear() => linear.clone(),
            dtype => cx.cast(&raw, dtype)?,
        };
        Ok(Self { raw, linear, branch })
    }

    /// The input of one LoRA branch: PEFT casts to the adapter's dtype, drops, and autocast rounds.
    fn dropped(&self, cx: &Context<'_>, module: usize) -> Result<Tensor> {
        if cx.options.dropout.is_none() {
            return Ok(self.branch.clone());
        }
        let x = cx.cast(&self.raw, cx.adapter.dtype)?;
        cx.cast(&cx.dropout(&x, module)?, cx.plan.branch())
    }
}

/// y [n, out] in the linear dtype, and A x [n, r] where the linear is adapted.
pub(super) fn forward(
    cx: &Context<'_>,
    layer: usize,
    projection: Projection,
    x: &Operand,
) -> Result<(Tensor, Option<Tensor>)> {
    let (device, plan) = (cx.device, cx.plan);
    let Linear { w, bias } = &cx.held.layers[layer].linears[projection as usize];
    let site = |role| Site::block(layer, Part::Projection(projection), role);
    // Autocast rounds the bias like the weight.
    let bias = match bias {
        Some(bias) if plan.linear().is_half() => Some(cx.cast(bias, plan.linear())?),
        bias => bias.clone(),
    };
    let Some((index, lora)) = cx.adapter.at(layer, projection) else {
        let y = device.linear(&x.linear, w, bias.as_ref(), plan.compute(), plan.linear())?;
        return Ok((cx.observe(site(Role::Output), y)?, None));
    };
    let (branch, compute) = (plan.branch(), plan.branch_compute());
    let u = device.linear(&x.dropped(cx, index)?, &lora.a, None, compute, branch)?;
    let u = cx.observe(site(Role::LoraHidden), u)?;
    let term = LowRank { x: &u, w: &lora.b, compute, dtype: branch };
    let scaling = cx.adapter.scaling;
    let y = device.linear_adapted(&x.linear, w, bias.as_ref(), plan.compute(), plan.linear(), &term, scaling)?;
    Ok((cx.observe(site(Role::Output), y)?, Some(u)))
}

/// The gradient of an input that several linears share.
pub(super) struct InputGrad {
    sum: Option<Tensor>,
    /// The linear whose part makes it whole; sums before that are not observed.
    last: Projection,
    wanted: bool,
}

impl InputGrad {
    pub fn until(last: Projection) -> Self {
        Self { sum: None, last, wanted: true }
    }

    pub fn wanted(self, wanted: bool) -> Self {
        Self { wanted, ..self }
    }

    /// The gradient, if it is wanted and anything was added.
    pub fn finish(self) -> Option<Tensor> {
        self.sum
    }

    /// Adds `d` as autograd accumulates at a tensor used more than once: both in the tensor's dtype, one rounding
    /// per addition.
    fn add(&mut self, cx: &Context<'_>, d: &Tensor, dtype: DType) -> Result<()> {
        let d = cx.cast(d, dtype)?;
        self.sum = Some(match self.sum.take() {
            None => d,
            Some(so_far) => cx.device.add(&so_far, &d, dtype)?,
        });
        Ok(())
    }
}

/// Adds the LoRA gradients of `dy` to `sink`, and the gradient of the input to `dx` (autograd's order: the LoRA
/// branch was recorded last, so it arrives first).
pub(super) fn backward(
    cx: &Context<'_>,
    (layer, projection): (usize, Projection),
    dy: Tensor,
    x: &Operand,
    u: Option<Tensor>,
    dx: &mut InputGrad,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let dy = cx.observe(Site::block(layer, Part::Projection(projection), Role::OutputGrad), dy)?;
    let adapted = cx.adapter.at(layer, projection);
    let du = match (adapted, u) {
        (Some(adapted), Some(u)) => Some(branch_backward(cx, adapted, &dy, x, &u, sink)?),
        _ => None,
    };
    if !dx.wanted {
        return Ok(());
    }
    let (branch, compute, dtype) = (cx.plan.branch(), cx.plan.branch_compute(), x.raw.dtype);
    let mut term =
        du.as_ref().zip(adapted).map(|(du, (_, lora))| LowRank { x: du, w: &lora.a, compute, dtype: branch });
    if let (Some(LowRank { x: du, w: a, .. }), Some((index, _)), true) = (term, adapted, cx.options.dropout.is_some()) {
        // The mask lies between the branch's product and the sum.
        cx.unmeasured(|| {
            let d = cx.device.linear_input_grad(du, a, compute, branch)?;
            let d = cx.dropout(&cx.cast(&d, cx.adapter.dtype)?, index)?;
            dx.add(cx, &d, dtype)
        })?;
        term = None;
    }
    let w = &cx.held.layers[layer].linears[projection as usize].w;
    let (compute, out) = (cx.plan.compute(), cx.plan.linear());
    let so_far = dx.sum.take();
    let add = || cx.device.linear_input_grad_onto(so_far, term.as_ref(), &dy, w, compute, out, dtype);
    dx.sum = Some(if projection == dx.last { add() } else { cx.unmeasured(add) }?);
    Ok(())
}

/// Adds the gradients of A and B per micro-batch to `sink`; returns the gradient of A x.
fn branch_backward(
    cx: &Context<'_>,
    (index, lora): (usize, &LoraModule),
    dy: &Tensor,
    x: &Operand,
    u: &Tensor,
    sink: &mut Sink<'_>,
) -> Result<Tensor> {
    let device = cx.device;
    let (branch, compute) = (cx.plan.branch(), cx.plan.branch_compute());
    let dv = device.scale(dy, cx.adapter.scaling, branch)?;
    let db = cx.weight_grad(&dv, u, compute, branch)?;
    let du = device.linear_input_grad(&dv, &lora.b, compute, branch)?;
    let dropped = x.dropped(cx, index)?;
    let da = cx.weight_grad(&du, &dropped, compute, branch)?;
    sink.add(cx, lora, 2 * index, Role::LoraAGrad, da)?;
    sink.add(cx, lora, 2 * index + 1, Role::LoraBGrad, db)?;
    Ok(du)
}

//! The page, top to bottom: what happened, the proof, then everything a second reader asks for.

use std::fmt::Write as _;

use super::words::{cause_title, confidence_word, evidence, remedy, spike_line, tone};
use super::{View, charts, tables};
use crate::diagnosis::Cause;
use crate::report::html::{Document, escape};
use crate::report::number;

impl View<'_> {
    /// The report as one HTML file.
    pub fn html(&self) -> String {
        let mut page = Document::new(&format!("{} · spikeprobe", self.name));
        page.push(&format!(
            "<header class=\"top\"><span><b>{}</b></span><span>spikeprobe {} · {}</span></header>",
            escape(&self.name),
            env!("CARGO_PKG_VERSION"),
            escape(&tables::log_span(self.log))
        ));
        page.push(&self.headline());
        page.section(
            "Log and replay",
            "The broad grey line is what the trainer logged, the thin blue one what was replayed from disk. Where they \
             lie on each other, the replay explains the log.",
            &charts::curves(self),
        );
        page.section(
            "One thing changed at a time",
            "Each panel replays the same steps with one change. Grey: unchanged.",
            &charts::counterfactuals(self),
        );
        page.section("Shares", "How the height divides over everything that moved it.", &tables::shares(self));
        page.section("Rows behind it", "Rows count from 0 in the dataset's file.", &tables::rows(self));
        page.section(
            "Micro-batches",
            "One column an optimizer step, one cell a forward and backward. Framed cells hold the rows named above.",
            &charts::micro_maps(self),
        );
        page.section("Number ranges inside the model", "", &tables::sites(self));
        page.section("Experiments", "", &tables::experiments(self));
        page.section("Spikes in the log", "", &tables::spikes(self));
        page.section("Certificate", "", &tables::certificate(self));
        page.section("Findings", "", &tables::findings(self));
        page.push(&format!(
            "<footer>Heights are natural logarithms of loss over the recent minimum. {} steps were replayed beyond the \
             baseline. This file makes no network requests.</footer>",
            self.diagnosis.windows_replayed
        ));
        page.finish()
    }

    fn headline(&self) -> String {
        let verdict = &self.diagnosis.verdict;
        let spike = self.spike();
        let place = spike.map_or(String::new(), |s| format!("Step {}: {}", s.step, spike_line(s)));
        let list = |lines: &[String]| -> String {
            lines.iter().fold(String::new(), |mut out, line| {
                let _ = write!(out, "<li>{}</li>", escape(line));
                out
            })
        };
        let mut out = format!(
            "<section class=\"headline {}\"><div class=\"word\">{}</div><h1>{}</h1><p class=\"summary\">{}</p>",
            tone(self.diagnosis),
            escape(&place),
            escape(cause_title(verdict.cause)),
            escape(&verdict.summary)
        );
        let _ = write!(
            out,
            "<div class=\"trio\"><div><h3>Why we think so</h3><ul>{}</ul></div><div><h3>What to change</h3><ul>{}</ul></div>\
             <div><h3>How sure</h3><ul>{}</ul></div></div>",
            list(&evidence(self.diagnosis, spike.map(|s| s.height))),
            self.remedy_items(),
            list(&self.certainty())
        );
        out.push_str(&self.fact_line());
        out.push_str("</section>");
        out
    }

    /// Settings as code, sentences as text.
    fn remedy_items(&self) -> String {
        let settings = self.diagnosis.fix.as_ref().map_or(0, |f| f.changes.len());
        let mut out = String::new();
        for (i, line) in remedy(self.diagnosis).iter().enumerate() {
            let (open, close) = if i < settings { ("<code>", "</code>") } else { ("", "") };
            let _ = write!(out, "<li>{open}{}{close}</li>", escape(line));
        }
        out
    }

    fn certainty(&self) -> Vec<String> {
        let verdict = &self.diagnosis.verdict;
        let mut lines = vec![format!("Confidence: {}", confidence_word(verdict.confidence))];
        if !matches!(verdict.cause, Cause::None | Cause::Undetermined) {
            lines.push(if verdict.harmful {
                "The training was harmed by it".into()
            } else {
                "Harmless: the later loss is as if it had not happened".into()
            });
        }
        if !verdict.also_sufficient.is_empty() {
            let others: Vec<String> = verdict.also_sufficient.iter().map(|c| super::words::plain(c.word())).collect();
            lines.push(format!("Also removes it, but less specific: {}", others.join(", ")));
        }
        lines
    }

    fn fact_line(&self) -> String {
        let mut facts = String::new();
        for (name, value) in &self.facts {
            // A value stands out; a sentence of evidence does not have to.
            let tag = if value.len() <= 40 { "b" } else { "i" };
            let _ = write!(facts, "<span>{} <{tag}>{}</{tag}></span>", escape(name), escape(value));
        }
        if let Some(spike) = self.spike() {
            let _ = write!(facts, "<span>height <b>{}</b></span>", number(spike.height));
        }
        format!("<div class=\"facts\">{facts}</div>")
    }
}

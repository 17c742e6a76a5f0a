//! Says how far long work is: a bar on a terminal, a line now and then elsewhere, so that a log shows that it moves.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(20);

static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// One piece of long work.
#[derive(Debug)]
pub struct Progress {
    label: String,
    unit: &'static str,
    total: u64,
    bar: Option<ProgressBar>,
    last_line: Instant,
    started: Instant,
}

impl Progress {
    /// `total` may be a guess; 0 where nothing is known.
    pub fn new(label: impl Into<String>, total: u64, unit: &'static str) -> Self {
        let label = label.into();
        let now = Instant::now();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = if total == 0 { ProgressBar::new_spinner() } else { ProgressBar::new(total) };
            let template = if total == 0 { "{msg}: {pos} {prefix}" } else { "{msg} [{bar:30}] {pos}/{len} {prefix}" };
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            BARS.add(bar).with_style(style).with_message(label.clone()).with_prefix(unit)
        });
        if bar.is_none() {
            eprintln!("{label}");
        }
        Self { label, unit, total, bar, last_line: now, started: now }
    }

    /// So much of it is done.
    pub fn at(&mut self, done: u64) {
        // The total may have been a guess: what is not finished does not look finished.
        let shown = if self.total == 0 { done } else { done.min(self.total.saturating_sub(1)) };
        if let Some(bar) = &self.bar {
            bar.set_position(shown);
        } else if self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let of = if self.total == 0 { String::new() } else { format!(" of about {}", self.total) };
            eprintln!("{}: {shown}{of} {} after {} s", self.label, self.unit, self.started.elapsed().as_secs());
        }
    }

    /// It is finished.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.started.elapsed().as_secs();
        note(&format!("{}: done in {seconds} s", self.label));
    }
}

/// A line for people, on stderr.
pub fn note(line: &str) {
    BARS.suspend(|| eprintln!("{line}"));
}

/// A line of the result, on stdout.
pub fn line(line: &str) {
    BARS.suspend(|| {
        let mut out = std::io::stdout().lock();
        // A reader who has gone away (`| head`) is no reason to stop the tests.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    });
}

/// Which colour a word has, on a terminal.
#[derive(Clone, Copy, Debug)]
pub enum Colour {
    Green,
    Red,
}

/// The text, in colour if stdout is a terminal and nobody has said NO_COLOR.
pub fn coloured(text: &str, colour: Colour) -> String {
    if !std::io::stdout().is_terminal() || std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty()) {
        return text.to_owned();
    }
    let code = match colour {
        Colour::Green => 32,
        Colour::Red => 31,
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

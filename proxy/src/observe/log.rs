//! The log: lines on stderr, written by a thread of their own so that no worker waits for a slow reader.
//!
//! If the reader cannot keep up, lines are dropped and counted (`tlsplice_log_lines_dropped_total`), never queued
//! without end.

mod json;

use crate::config::{Log, LogFormat};
use std::io::{self, IsTerminal};
use tracing::Level;
use tracing::level_filters::LevelFilter;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

/// Lines that wait for the reader before one is dropped: about 10 MB at a line's usual 300 bytes.
const QUEUE_LINES: usize = 32_768;

/// The running log; dropping it writes what is queued.
pub struct Logging {
    level: reload::Handle<LevelFilter, Registry>,
    dropped: ErrorCounter,
    _flushes_when_dropped: WorkerGuard,
}

impl Logging {
    /// Starts a thread; privileges are dropped before.
    pub fn start(log: &Log) -> Self {
        let (writer, guard) = NonBlockingBuilder::default()
            .lossy(true)
            .buffered_lines_limit(QUEUE_LINES)
            .thread_name("log")
            .finish(io::stderr());
        let dropped = writer.error_counter();
        let (level, handle) = reload::Layer::new(LevelFilter::from_level(log.level));
        let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_target(false);
        let lines = match log.format {
            LogFormat::Json => lines.event_format(json::JsonLine).boxed(),
            LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).boxed(),
        };
        // Fails only where a test has set a subscriber already.
        let _ = tracing_subscriber::registry().with(level).with(lines).try_init();
        Self { level: handle, dropped, _flushes_when_dropped: guard }
    }

    pub fn set_level(&self, level: Level) {
        // Fails only if the subscriber is gone, and it lives as long as the process.
        let _ = self.level.reload(LevelFilter::from_level(level));
    }

    /// Lines dropped so far.
    pub fn dropped(&self) -> DroppedLines {
        DroppedLines(self.dropped.clone())
    }
}

/// Counts the lines that were dropped.
#[derive(Debug, Clone)]
pub struct DroppedLines(ErrorCounter);

impl DroppedLines {
    pub fn get(&self) -> u64 {
        u64::try_from(self.0.dropped_lines()).unwrap_or(u64::MAX)
    }
}

//! An event as one line of JSON: `{"timestamp":…,"level":…,"message":…,FIELD:…}`.
//!
//! Mode http writes a line for each request, so a line must not cost what a request does: fields go from the event
//! straight into the line, without a tree or a string of their own between.

use std::fmt::{self, Debug, Write};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// See the module.
pub struct JsonLine;

impl<S, N> FormatEvent<S, N> for JsonLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut line: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        line.write_str("{\"timestamp\":\"")?;
        SystemTime.format_time(&mut line)?;
        line.write_str("\",\"level\":\"")?;
        line.write_str(event.metadata().level().as_str())?;
        line.write_char('"')?;
        let mut fields = Fields { line: &mut line, result: Ok(()) };
        event.record(&mut fields);
        fields.result?;
        line.write_str("}\n")
    }
}

/// Writes `,"name":value` for each field.
struct Fields<'a, 'w> {
    line: &'a mut Writer<'w>,
    result: fmt::Result,
}

impl Fields<'_, '_> {
    fn field(&mut self, field: &Field, value: impl FnOnce(&mut Writer<'_>) -> fmt::Result) {
        if self.result.is_ok() {
            self.result = self.try_field(field, value);
        }
    }

    fn try_field(&mut self, field: &Field, value: impl FnOnce(&mut Writer<'_>) -> fmt::Result) -> fmt::Result {
        self.line.write_str(",\"")?;
        Escaped(self.line).write_str(field.name())?;
        self.line.write_str("\":")?;
        value(self.line)
    }
}

impl Visit for Fields<'_, '_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.field(field, |line| quoted(line, |line| line.write_str(value)));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.field(field, |line| write!(line, "{value}"));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.field(field, |line| write!(line, "{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.field(field, |line| line.write_str(if value { "true" } else { "false" }));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON knows no other numbers.
        self.field(field, |line| if value.is_finite() { write!(line, "{value}") } else { line.write_str("null") });
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.field(field, |line| quoted(line, |line| write!(line, "{value:?}")));
    }
}

fn quoted(line: &mut Writer<'_>, value: impl FnOnce(&mut Escaped<'_, '_>) -> fmt::Result) -> fmt::Result {
    line.write_char('"')?;
    value(&mut Escaped(line))?;
    line.write_char('"')
}

/// What is written into it stands within a string of JSON (RFC 8259 section 7).
struct Escaped<'a, 'w>(&'a mut Writer<'w>);

impl Write for Escaped<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.bytes().position(|byte| byte < b' ' || byte == b'"' || byte == b'\\') {
            self.0.write_str(&rest[..at])?;
            match rest.as_bytes()[at] {
                b'"' => self.0.write_str("\\\"")?,
                b'\\' => self.0.write_str("\\\\")?,
                b'\n' => self.0.write_str("\\n")?,
                b'\r' => self.0.write_str("\\r")?,
                b'\t' => self.0.write_str("\\t")?,
                control => write!(self.0, "\\u{control:04x}")?,
            }
            // What was looked for is ASCII, so the next character begins behind it.
            rest = &rest[at + 1..];
        }
        self.0.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;
    use std::io;
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::layer::SubscriberExt;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("not poisoned").extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn line(log: impl FnOnce()) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let layer = tracing_subscriber::fmt::layer().event_format(JsonLine).with_writer(move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
        let bytes = lines.0.lock().expect("not poisoned").clone();
        String::from_utf8(bytes).expect("UTF-8")
    }

    #[test]
    fn a_line_has_every_field_with_its_type() {
        let peer = "192.0.2.7";
        let text = line(|| {
            tracing::warn!(%peer, what = ?Some("a\"b"), n = 7u64, less = -3i64, half = 0.5, none = f64::NAN, yes = true, "it \\ ended");
        });
        assert!(text.ends_with("}\n") && text.lines().count() == 1, "{text}");
        let value: Value = serde_json::from_str(&text).expect("JSON");
        let timestamp = value["timestamp"].as_str().expect("a timestamp");
        assert!(timestamp.len() == "2026-01-02T03:04:05.678901Z".len() && timestamp.ends_with('Z'), "{timestamp}");
        let want = serde_json::json!({
            "timestamp": timestamp, "level": "WARN", "message": "it \\ ended", "peer": "192.0.2.7", "what": "Some(\"a\\\"b\")",
            "n": 7, "less": -3, "half": 0.5, "none": null, "yes": true,
        });
        assert_eq!(value, want);
    }

    proptest! {
        #[test]
        fn any_text_comes_back(text in any::<String>()) {
            let written = line(|| tracing::error!(text, shown = %text, "m"));
            let value: Value = serde_json::from_str(&written).expect("JSON");
            prop_assert_eq!(value["text"].as_str(), Some(&*text));
            prop_assert_eq!(value["shown"].as_str(), Some(&*text));
            prop_assert_eq!(written.lines().count(), 1);
        }
    }
}

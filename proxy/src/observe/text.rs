//! OpenMetrics to the Prometheus text format 0.0.4: the same samples under heads of the older kind.
//!
//!   # TYPE a counter  +  a_total 1     ─▶     # TYPE a_total counter  +  a_total 1

use std::fmt::Write;

pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
pub const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Which of the two a client asks for by its Accept header.
pub fn wants_openmetrics(accept: &str) -> bool {
    // Whoever takes OpenMetrics at all prefers it, as Prometheus does; nothing else is served in two forms.
    accept.split(',').any(|kind| kind.trim_start().to_ascii_lowercase().starts_with("application/openmetrics-text"))
}

/// The same in the older format. In it a family's name is that of its samples.
pub fn prometheus(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len() + 1024);
    let mut help = None;
    for line in openmetrics.lines() {
        let Some(head) = line.strip_prefix("# ") else {
            text.push_str(line);
            text.push('\n');
            continue;
        };
        let mut words = head.splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            (Some("HELP"), Some(name), Some(words)) => help = Some((name, words)),
            (Some("TYPE"), Some(name), Some(kind)) => {
                let (suffix, kind) = match kind {
                    "counter" => ("_total", "counter"),
                    "info" => ("_info", "gauge"),
                    "unknown" => ("", "untyped"),
                    other => ("", other),
                };
                if let Some((of, words)) = help.take().filter(|(of, _)| *of == name) {
                    // Writing to a String fails never.
                    let _ = writeln!(text, "# HELP {of}{suffix} {words}");
                }
                let _ = writeln!(text, "# TYPE {name}{suffix} {kind}");
            }
            // Units are part of the name; the end of the text is its end.
            _ => {}
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_take_the_names_of_their_samples() {
        let openmetrics = "# HELP a Things.\n# TYPE a counter\na_total{x=\"# y\"} 1\n# HELP b B.\n# TYPE b info\nb_info{v=\"1\"} 1\n\
             # HELP c_seconds C.\n# TYPE c_seconds histogram\n# UNIT c_seconds seconds\nc_seconds_sum 1\n# EOF\n";
        let text = "# HELP a_total Things.\n# TYPE a_total counter\na_total{x=\"# y\"} 1\n# HELP b_info B.\n\
             # TYPE b_info gauge\nb_info{v=\"1\"} 1\n# HELP c_seconds C.\n# TYPE c_seconds histogram\nc_seconds_sum 1\n";
        assert_eq!(prometheus(openmetrics), text);
    }

    #[test]
    fn openmetrics_goes_to_those_who_ask() {
        assert!(wants_openmetrics("application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5"));
        assert!(!wants_openmetrics("text/plain"));
        assert!(!wants_openmetrics(""));
    }
}

//! The result of all runs: a line for each kernel, then what failed, then the sum.

use crate::progress::{self, Colour};
use crate::suite::Report;
use anyhow::Result;

/// A line of the table.
#[derive(Debug)]
pub struct Row {
    name: String,
    outcome: Outcome,
    /// A failure fails the whole command. Otherwise it is shown, and counted as skipped.
    enforced: bool,
}

#[derive(Debug)]
enum Outcome {
    Ran(Report),
    /// It could not be had; that is declared, and no failure.
    Declared(String),
    Broken(String),
}

impl Row {
    /// A run; an error is one that did not come about.
    pub fn new(name: &str, report: Result<Report>) -> Self {
        let outcome = report.map_or_else(|error| Outcome::Broken(format!("{error:#}")), Outcome::Ran);
        Self { name: name.into(), outcome, enforced: true }
    }

    /// A kernel that nobody serves any more.
    pub fn declared(name: &str, reason: String) -> Self {
        Self { name: name.into(), outcome: Outcome::Declared(reason), enforced: true }
    }

    /// A run that is shown, and whose failures are not counted yet.
    pub fn unenforced(self) -> Self {
        Self { enforced: false, ..self }
    }

    /// What the row adds to the sum.
    fn sum(&self) -> (u64, u64, u64) {
        let (passed, failed, skipped) = self.counts();
        if self.enforced { (passed, failed, skipped) } else { (passed, 0, skipped + failed) }
    }

    /// Passed, failed, skipped. A run that broke counts as one failure, so that the sum cannot hide it.
    fn counts(&self) -> (u64, u64, u64) {
        match &self.outcome {
            Outcome::Ran(report) => {
                let broken = u64::from(report.problem.is_some() && report.failed == 0);
                (report.passed, report.failed + broken, report.skipped)
            }
            Outcome::Declared(_) => (0, 0, 1),
            Outcome::Broken(_) => (0, 1, 0),
        }
    }

    fn cells(&self) -> [String; 8] {
        let (passed, failed, skipped) = self.counts();
        let (offloaded, spliced, seconds) = match &self.outcome {
            Outcome::Ran(report) if self.name == "unit" => (None, None, Some(report.took.as_secs())),
            Outcome::Ran(report) => (Some(report.offloaded), Some(report.spliced_bytes), Some(report.took.as_secs())),
            Outcome::Declared(_) | Outcome::Broken(_) => (None, None, None),
        };
        let cell = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |n| n.to_string());
        [
            self.name.clone(),
            (passed + failed).to_string(),
            passed.to_string(),
            failed.to_string(),
            skipped.to_string(),
            cell(offloaded),
            spliced.map_or_else(|| "-".to_owned(), size),
            cell(seconds),
        ]
    }

    /// What a person has to know beyond the numbers.
    fn remarks(&self) -> Vec<String> {
        let open = if self.enforced { "" } else { " (not enforced yet)" };
        let with_name = |text: &str| format!("{}{open}: {text}", self.name);
        match &self.outcome {
            Outcome::Ran(report) => {
                let failures = report.failures.iter().map(|name| with_name(&format!("FAILED {name}")));
                let again = report.again.iter().map(|name| with_name(&format!("run once more: {name}")));
                failures.chain(again).chain(report.problem.iter().map(|p| with_name(&format!("BROKEN: {p}")))).collect()
            }
            Outcome::Declared(reason) => vec![with_name(&format!("NOT TESTED, it cannot be had any more: {reason}"))],
            Outcome::Broken(reason) => vec![with_name(&format!("BROKEN: {reason}"))],
        }
    }
}

/// Prints all of it; gives the exit status.
pub fn conclude(rows: &[Row]) -> i32 {
    let (lines, status) = summed_up(rows);
    lines.iter().for_each(|line| progress::line(line));
    status
}

fn summed_up(rows: &[Row]) -> (Vec<String>, i32) {
    let heads = ["kernel", "run", "passed", "failed", "skipped", "offloaded", "spliced", "seconds"].map(str::to_owned);
    let cells: Vec<[String; 8]> = std::iter::once(heads).chain(rows.iter().map(Row::cells)).collect();
    let width = |column: usize| cells.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; 8] = std::array::from_fn(width);
    let mut lines = vec![String::new()];
    for (at, row) in cells.iter().enumerate() {
        let first = format!("{:<1$}", row[0], widths[0]);
        let others = (1..8).map(|column| format!("{:>1$}", row[column], widths[column]));
        let text = std::iter::once(first).chain(others).collect::<Vec<_>>().join("  ");
        let failed = at > 0 && rows[at - 1].counts().1 > 0;
        lines.push(if failed { progress::coloured(&text, Colour::Red) } else { text });
    }
    lines.push(String::new());
    lines.extend(rows.iter().flat_map(Row::remarks));
    let sum = |pick: fn((u64, u64, u64)) -> u64| rows.iter().map(|row| pick(row.sum())).sum::<u64>();
    let (passed, failed, skipped) = (sum(|c| c.0), sum(|c| c.1), sum(|c| c.2));
    lines.push(String::new());
    lines.push(format!("{passed} passed, {failed} failed, {skipped} skipped"));
    (lines, i32::from(failed > 0 || passed == 0))
}

fn size(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..10_000_000 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_run_fails_the_whole_and_a_declared_one_does_not() {
        let good = || Row::new("host", Ok(Report { passed: 3, ..Report::default() }));
        let status = |rows: &[Row]| summed_up(rows).1;
        assert_eq!(status(&[good()]), 0);
        assert_eq!(status(&[good(), Row::declared("6.18", "gone".into())]), 0);
        assert_eq!(status(&[good(), Row::new("uml", Err(anyhow::anyhow!("no gcc")))]), 1);
        let failed = || Row::new("6.1", Ok(Report { failed: 1, ..Report::default() }));
        assert_eq!(status(&[good(), failed()]), 1);
        assert_eq!(status(&[good(), failed().unenforced()]), 0);
        assert_eq!(status(&[]), 1, "a run of nothing has not passed");
        let broken = Report { passed: 3, problem: Some("panic".into()), ..Report::default() };
        let (lines, status) = summed_up(&[Row::new("6.1", Ok(broken)), Row::declared("6.18", "gone".into())]);
        assert_eq!((lines.last().map(String::as_str), status), (Some("3 passed, 1 failed, 1 skipped"), 1));
    }
}

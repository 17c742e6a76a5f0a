//! What is wrong with a configuration file, and where: said to a person who has the file open.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Characters of the file that a message repeats at most.
const FOUND_MAX_CHARS: usize = 80;

/// Everything that could be found wrong in one file. Never empty.
#[derive(Debug, thiserror::Error)]
pub struct Invalid {
    file: PathBuf,
    problems: Vec<Problem>,
}

/// One place and what is wrong there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Both count from 1; a column is a character, not a byte.
    pub line: usize,
    pub column: usize,
    pub message: String,
    /// The file is right and this version cannot do it.
    pub not_in_this_version: bool,
}

impl Invalid {
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// At least one problem is that this version lacks something of the contract.
    pub fn asks_for_what_is_not_built(&self) -> bool {
        self.problems.iter().any(|p| p.not_in_this_version)
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            let newline = if index == 0 { "" } else { "\n" };
            let Problem { line, column, message, .. } = problem;
            write!(f, "{newline}{}:{line}:{column}: {message}", self.file.display())?;
        }
        Ok(())
    }
}

/// Gathers problems while a file is read, so that one run names them all.
pub(super) struct Problems<'a> {
    file: &'a Path,
    text: &'a str,
    found: Vec<(usize, Problem)>,
}

impl<'a> Problems<'a> {
    pub(super) fn new(file: &'a Path, text: &'a str) -> Self {
        Self { file, text, found: Vec::new() }
    }

    pub(super) fn text(&self) -> &'a str {
        self.text
    }

    pub(super) fn add(&mut self, span: Range<usize>, message: String) {
        self.push(span.start, message, false);
    }

    pub(super) fn add_not_built(&mut self, span: Range<usize>, what: &str) {
        self.push(span.start, format!("{what}: not in this version"), true);
    }

    fn push(&mut self, offset: usize, message: String, not_in_this_version: bool) {
        let (line, column) = position(self.text, offset);
        self.found.push((offset, Problem { line, column, message, not_in_this_version }));
    }

    /// `None` if nothing was found wrong; else all of it in the order of the file.
    pub(super) fn into_invalid(mut self) -> Option<Invalid> {
        if self.found.is_empty() {
            return None;
        }
        self.found.sort_by_key(|(offset, _)| *offset);
        self.found.dedup();
        let problems = self.found.into_iter().map(|(_, problem)| problem).collect();
        Some(Invalid { file: self.file.to_path_buf(), problems })
    }
}

/// What stands in the file at `span`, short enough for a message.
pub(super) fn excerpt(text: &str, span: Range<usize>) -> String {
    let whole = text.get(span).unwrap_or("").trim();
    let mut short: String = whole.chars().take(FOUND_MAX_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if short.len() < whole.len() {
        short.push('…');
    }
    short
}

/// Line and column of a byte, both from 1.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..offset.min(text.len())];
    let line = before.iter().filter(|b| **b == b'\n').count() + 1;
    let start = before.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    let column = String::from_utf8_lossy(&before[start..]).chars().count() + 1;
    (line, column)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_counts_characters_from_one() {
        let text = "a = 1\nä = \"x\"\n";
        assert_eq!(position(text, 0), (1, 1));
        assert_eq!(position(text, 6), (2, 1));
        assert_eq!(position(text, text.find('=').expect("there")), (1, 3));
        assert_eq!(position(text, text.rfind('=').expect("there")), (2, 3));
        assert_eq!(position(text, 1000), (3, 1));
    }

    #[test]
    fn a_long_excerpt_is_cut() {
        let text = "x".repeat(500);
        assert_eq!(excerpt(&text, 0..500).chars().count(), FOUND_MAX_CHARS + 1);
    }
}

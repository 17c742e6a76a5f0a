//! Where the word `unsafe` may stand. The compiler's lint `unsafe_code` is denied for the whole workspace, but any file can
//! allow it for itself; this looks at the files.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// Files and folders that may hold unsafe code, with the reason.
const ALLOWED: [(&str, &str); 5] = [
    ("proxy/src/sys.rs", "system calls"),
    ("proxy/src/sys/", "system calls"),
    ("ebpf/", "programs that the kernel runs"),
    ("bench/src/plugin/", "the counting plugin of QEMU"),
    ("xtask/src/init.rs", "the first process of a guest"),
];
/// Folders with Rust of ours.
const TOPS: [&str; 5] = ["proxy", "ebpf", "xtask", "bench", "tests"];
/// What is looked for: the keyword, and the lint's name where a file allows it for itself.
const WORDS: [&str; 2] = ["unsafe", "unsafe_code"];

/// An error that names every place where it stands and must not.
pub fn check(workspace: &Path) -> Result<()> {
    let mut files = Vec::new();
    for top in TOPS {
        rust_files(&workspace.join(top), &mut files)?;
    }
    let mut places = Vec::new();
    for file in files {
        let name = file.strip_prefix(workspace).unwrap_or(&file).to_string_lossy().into_owned();
        if ALLOWED.iter().any(|(allowed, _)| name.starts_with(allowed)) {
            continue;
        }
        let source = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        places.extend(lines_with_it(&source).into_iter().map(|line| format!("{name}:{line}")));
    }
    if !places.is_empty() {
        let allowed: Vec<_> = ALLOWED.iter().map(|(place, _)| *place).collect();
        bail!("unsafe code at {}; it may only be in {}", places.join(", "), allowed.join(", "));
    }
    Ok(())
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?.flatten() {
        let path = entry.path();
        // What cargo has built is not ours.
        let built = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("target"));
        if path.is_dir() && !built {
            rust_files(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// The lines, from 1, on which one of the words stands as code.
fn lines_with_it(source: &str) -> Vec<usize> {
    let code = without_comments_and_text(source);
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let has = |line: &str| line.split(|c| !is_word(c)).any(|word| WORDS.contains(&word));
    (1..).zip(code.lines()).filter(|(_, line)| has(line)).map(|(number, _)| number).collect()
}

/// The source with everything blanked that is a comment or a literal; lines stay where they are.
fn without_comments_and_text(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let length = skipped(rest, code.chars().next_back());
        if length == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.push(' ');
            code.extend(rest[..length].chars().filter(|c| *c == '\n'));
            rest = &rest[length..];
        }
    }
    code
}

/// How many bytes a comment or literal takes that begins here; 0 where none does.
fn skipped(rest: &str, before: Option<char>) -> usize {
    let to = |end: Option<usize>| end.unwrap_or(rest.len());
    if rest.starts_with("//") {
        return to(rest.find('\n'));
    }
    if rest.starts_with("/*") {
        return to(rest.find("*/").map(|at| at + 2));
    }
    let in_a_word = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    if !in_a_word && rest.starts_with('r') {
        let hashes = rest[1..].bytes().take_while(|b| *b == b'#').count();
        if rest[1 + hashes..].starts_with('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            let from = 2 + hashes;
            return to(rest[from..].find(&end).map(|at| from + at + end.len()));
        }
    }
    if rest.starts_with('"') {
        return to(quoted(rest, '"'));
    }
    // '"' and '\'' are literals; 'a in a type is a lifetime, and ends without a quote.
    if let Some(inner) = rest.strip_prefix('\'') {
        let mut inner = inner.chars();
        return match (inner.next(), inner.next()) {
            (Some('\\'), _) => to(quoted(rest, '\'')),
            (Some(c), Some('\'')) => 2 + c.len_utf8(),
            _ => 0,
        };
    }
    0
}

/// Where a literal with escapes ends that begins with this quote.
fn quoted(rest: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_counts_as_code_only() {
        let source = "// unsafe\nlet a = \"unsafe \\\" unsafe\";\n/* unsafe\nunsafe */ unsafe { x }\nlet b = r#\"unsafe\"#;\n\
            fn f<'a>(c: &'a str) { unsafe {} }\nlet q = '\"'; unsafe_name();\n#![allow(unsafe_code)]\n";
        assert_eq!(lines_with_it(source), [4, 6, 8]);
    }
}

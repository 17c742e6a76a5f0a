//! Reads one table of the file key by key: each key is asked for by name, and what was not asked for is unknown.

use super::problem::{Problems, excerpt};
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Why a value is refused.
pub(super) enum Refusal {
    /// It is not of the kind that the key takes; what is allowed, in words.
    Allowed(String),
    /// It is of the right kind and will not do.
    Because(String),
    /// The contract has it, this version has not.
    NotInThisVersion,
}

pub(super) type Read<T> = Result<T, Refusal>;

pub(super) fn allowed<T>(what: impl Into<String>) -> Read<T> {
    Err(Refusal::Allowed(what.into()))
}

pub(super) fn because<T>(why: impl Into<String>) -> Read<T> {
    Err(Refusal::Because(why.into()))
}

/// One table. `finish` refuses every key that nobody asked for.
pub(super) struct Section<'a> {
    /// As in the file: `limits`, or `listener` for one of `[[listener]]`.
    name: String,
    table: Option<&'a DeTable<'a>>,
    span: Range<usize>,
    asked: Vec<&'static str>,
}

impl<'a> Section<'a> {
    pub(super) fn new(name: &str, table: &'a DeTable<'a>, span: Range<usize>) -> Self {
        Self { name: name.to_owned(), table: Some(table), span, asked: Vec::new() }
    }

    /// A section that the file leaves out: every key is absent.
    pub(super) fn absent(name: &str) -> Self {
        Self { name: name.to_owned(), table: None, span: 0..0, asked: Vec::new() }
    }

    /// The head of the section, for problems which no key can be blamed for.
    pub(super) fn span(&self) -> Range<usize> {
        self.span.clone()
    }

    fn look_up(&mut self, key: &'static str) -> Option<(Range<usize>, &'a Spanned<DeValue<'a>>)> {
        self.asked.push(key);
        let (name, value) = self.table?.get_key_value(key)?;
        Some((name.span(), value))
    }

    /// Where the value of `key` stands; the head of the section if it is absent.
    pub(super) fn span_of(&self, key: &str) -> Range<usize> {
        self.table.and_then(|t| t.get(key)).map_or_else(|| self.span(), Spanned::span)
    }

    /// Whether the file has the key, whatever its value.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|t| t.contains_key(key))
    }

    /// The value of `key` and where it stands, if it is there and `read` takes it.
    pub(super) fn take<T>(
        &mut self,
        problems: &mut Problems<'_>,
        key: &'static str,
        read: impl FnOnce(&'a DeValue<'a>) -> Read<T>,
    ) -> Option<(T, Range<usize>)> {
        let (_, value) = self.look_up(key)?;
        let path = self.path(key);
        let taken = accept(problems, &path, value, read)?;
        Some((taken, value.span()))
    }

    /// Like `take`, with a default for an absent (or refused) key.
    pub(super) fn take_or<T>(
        &mut self,
        problems: &mut Problems<'_>,
        key: &'static str,
        default: T,
        read: impl FnOnce(&'a DeValue<'a>) -> Read<T>,
    ) -> T {
        self.take(problems, key, read).map_or(default, |(value, _)| value)
    }

    /// The elements of the array `key`, each with its place. `None` if the key is absent or no array.
    pub(super) fn take_list<T>(
        &mut self,
        problems: &mut Problems<'_>,
        key: &'static str,
        kind: &str,
        read: impl Fn(&'a DeValue<'a>) -> Read<T>,
    ) -> Option<Vec<(T, Range<usize>)>> {
        let (_, value) = self.look_up(key)?;
        let path = self.path(key);
        let list = accept(problems, &path, value, |v| match v {
            DeValue::Array(items) => Ok(items),
            DeValue::String(_)
            | DeValue::Integer(_)
            | DeValue::Float(_)
            | DeValue::Boolean(_)
            | DeValue::Datetime(_)
            | DeValue::Table(_) => allowed(format!("a list of {kind}")),
        })?;
        let mut taken = Vec::with_capacity(list.len());
        for item in list.iter() {
            if let Some(element) = accept(problems, &path, item, &read) {
                taken.push((element, item.span()));
            }
        }
        Some(taken)
    }

    /// Like `take_list`, for a key that has to be there with one element or more.
    pub(super) fn take_some<T>(
        &mut self,
        problems: &mut Problems<'_>,
        key: &'static str,
        kind: &str,
        read: impl Fn(&'a DeValue<'a>) -> Read<T>,
    ) -> Vec<(T, Range<usize>)> {
        match self.table.and_then(|t| t.get(key)) {
            None => self.missing(problems, key, &format!("a list of {kind}")),
            Some(value) => {
                if matches!(value.get_ref(), DeValue::Array(items) if items.is_empty()) {
                    problems
                        .add(value.span(), format!("{}: found []; allowed: at least one of {kind}", self.path(key)));
                }
            }
        }
        self.take_list(problems, key, kind, read).unwrap_or_default()
    }

    /// Refuses a key of the contract which this version has not, whatever its value.
    pub(super) fn not_built(&mut self, problems: &mut Problems<'_>, key: &'static str) {
        if let Some((span, _)) = self.look_up(key) {
            let path = self.path(key);
            problems.add_not_built(span, &path);
        }
    }

    pub(super) fn missing(&self, problems: &mut Problems<'_>, key: &str, what: &str) {
        problems.add(self.span(), format!("{}: missing; it takes {what}", self.path(key)));
    }

    pub(super) fn finish(self, problems: &mut Problems<'_>) {
        let Some(table) = self.table else { return };
        for name in table.keys().filter(|name| !self.asked.contains(&name.get_ref().as_ref())) {
            let found = excerpt(name.get_ref(), 0..name.get_ref().len());
            let place = if self.name.is_empty() { String::new() } else { format!(" in [{}]", self.name) };
            problems.add(name.span(), format!("unknown key \"{found}\"{place}; allowed: {}", self.asked.join(", ")));
        }
    }

    pub(super) fn path(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }
}

/// Runs `read` over one value and turns its refusal into a problem at the value's place.
fn accept<'a, T>(
    problems: &mut Problems<'_>,
    path: &str,
    value: &'a Spanned<DeValue<'a>>,
    read: impl FnOnce(&'a DeValue<'a>) -> Read<T>,
) -> Option<T> {
    let found = excerpt(problems.text(), value.span());
    match read(value.get_ref()) {
        Ok(taken) => return Some(taken),
        Err(Refusal::Allowed(what)) => problems.add(value.span(), format!("{path}: found {found}; allowed: {what}")),
        Err(Refusal::Because(why)) => problems.add(value.span(), format!("{path}: found {found}: {why}")),
        Err(Refusal::NotInThisVersion) => problems.add_not_built(value.span(), &format!("{path} = {found}")),
    }
    None
}

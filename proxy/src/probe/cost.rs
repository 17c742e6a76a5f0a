//! What pays on a kernel, by its series: defaults of cost, never of correctness. Nothing else asks for a version.
//!
//! The rows come from the cost curve (`cargo xtask bench --kernel uml --curve`, `cargo xtask insn --curve`); the figures are in
//! `bench/results/README.md`.

use serde::Serialize;

/// What `auto` stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Costs {
    /// `offload_after`: behind so many bytes in one direction, what the door cost has come back.
    pub offload_after_bytes: u64,
    /// `splice`: on io_uring's own threads instead of the worker's.
    pub splices_on_ring: bool,
    /// `splice`: what clients send is received and sent on, not spliced.
    pub copies_up: bool,
}

/// From which series on, and what holds there.
type Row = ((u32, u32), Costs);

/// Oldest first. What the door costs is the same 45 to 80 thousand instructions from 6.12 to 7.2, and in instructions alone no
/// series pays for it, so what a byte gains is a matter of time, which was measured on 7.2 only. The ring costs more than
/// the worker's own thread: on 7.2 in time, on 6.12 in instructions. An upload costs less copied than spliced, as a splice
/// takes one record and a receive a MiB of them, opened where it wants them: on 7.2 a fifth of the time. In instructions
/// it costs 1 to 2 % less from 6.12 on. The time of 6.1 is unknown.
const ROWS: [Row; 2] = [
    ((6, 1), Costs { offload_after_bytes: 1 << 20, splices_on_ring: false, copies_up: false }),
    ((6, 12), Costs { offload_after_bytes: 1 << 20, splices_on_ring: false, copies_up: true }),
];

impl Costs {
    /// Of the kernel with this `uname -r`. A series that was not measured has the row of the one before it, so one that is to
    /// come has the newest; what is no version, too.
    pub fn of(release: &str) -> Self {
        let newest = ROWS[ROWS.len() - 1].1;
        let Some(series) = series(release) else { return newest };
        ROWS.iter().rev().find(|(from, _)| series >= *from).map_or(ROWS[0].1, |(_, costs)| *costs)
    }
}

fn series(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_without_a_row_takes_the_one_before_it_and_what_is_none_the_newest() {
        let newest = ROWS[ROWS.len() - 1].1;
        for release in ["7.2.0-cloud-amd64", "99.0", "garbage", ""] {
            assert_eq!(Costs::of(release), newest, "{release}");
        }
        assert_eq!(Costs::of("5.10.0"), ROWS[0].1);
        assert_eq!(Costs::of("6.1.192-amd64"), ROWS[0].1);
        assert!(ROWS.is_sorted_by_key(|(from, _)| *from));
    }
}

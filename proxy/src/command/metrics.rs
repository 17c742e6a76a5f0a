//! `tlsplice metrics`: what the pinned maps hold, whether a tlsplice runs or not.

use super::show;
use crate::exit::{FINE, Failure};
use crate::observe::ebpf;
use crate::observe::metrics::Metrics;
use crate::observe::text;
use std::path::Path;
use std::sync::Arc;

/// # Errors
/// `Host`: there are no maps, or they may not be read.
pub fn metrics(pins: &Path, openmetrics: bool) -> Result<u8, Failure> {
    let maps = ebpf::open(pins).map_err(Failure::Host)?;
    let metrics = Metrics::new(Vec::new(), None, Some(Arc::new(maps)), Arc::default(), None);
    let all = metrics.text().map_err(|e| Failure::Host(e.to_string()))?;
    show(&if openmetrics { all } else { text::prometheus(&all) });
    Ok(FINE)
}

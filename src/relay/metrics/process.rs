//! The figures of the process, which are read when metrics are.

use std::fmt;
use std::time::SystemTime;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// Registers the version, the time of the start, and the memory.
pub(super) fn register(registry: &mut Registry) {
    let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("build", "The version of this relay", build);
    let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let help = "When the relay started, in seconds since 1970";
    registry.register_with_unit("start_timestamp", help, Unit::Seconds, ConstGauge::new(started.as_secs_f64()));
    registry.register_collector(Box::new(Memory));
}

/// The memory of the process.
#[derive(Debug)]
struct Memory;

impl Collector for Memory {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let resident = ConstGauge::new(resident_bytes());
        let help = "Resident memory of the process; 0 where the system does not say";
        let metric = encoder.encode_descriptor("resident_memory", help, Some(&Unit::Bytes), resident.metric_type())?;
        resident.encode(metric)
    }
}

/// Returns the resident memory in bytes, as Linux tells it.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kibibytes.unwrap_or_default() * 1024
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_memory_of_this_process_is_more_than_a_megabyte() {
        assert!(!cfg!(target_os = "linux") || super::resident_bytes() > 1 << 20);
    }
}

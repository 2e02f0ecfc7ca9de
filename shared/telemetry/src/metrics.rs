//! Metrics: one OpenTelemetry meter provider, read by Prometheus.
//!
//! Counters and the histogram are recorded where something happens; their label sets are built from static names and
//! shared ids, so that a record allocates nothing. Gauges are kept in atomics and read when somebody scrapes: those of a
//! backend or a node disappear with the last holder of its [`BackendMetrics`] or [`NodeMetrics`], instead of showing
//! their last value for ever.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::{AsyncInstrument, Counter, Histogram, Meter, MeterProvider as _};
use opentelemetry_sdk::metrics::SdkMeterProvider;
use prometheus::{Registry, TextEncoder};
use scaivault_domain::Reason;
use scaivault_domain::backend::BackendId;
use scaivault_domain::secret::Source;
use scaivault_domain::tenant::NodeName;
use scaivault_domain::time::Timestamp;

/// Upper bounds in seconds: local reads take tens of microseconds, proxied ones up to their deadline.
const READ_SECONDS: [f64; 16] =
    [1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Upper bounds in seconds: a sync that finds nothing changed takes less than one, the first of a large store hours.
const SYNC_SECONDS: [f64; 14] =
    [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0];

/// Whether a backend answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It does not.
    Down = 0,
    /// It does.
    Up = 1,
}

/// The state of a backend's breaker, in the order of alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breaker {
    /// Calls pass.
    Closed = 0,
    /// One call is let through to try.
    HalfOpen = 1,
    /// Calls are refused without being tried.
    Open = 2,
}

/// What the cache of a node had for a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The value.
    Hit,
    /// Nothing: the control plane has to be asked.
    Miss,
    /// That there is no such secret.
    Absent,
}

impl Lookup {
    fn as_str(self) -> &'static str {
        match self {
            Lookup::Hit => "hit",
            Lookup::Miss => "miss",
            Lookup::Absent => "absent",
        }
    }
}

/// How a backend is called, kept by whoever calls it and read when somebody scrapes.
#[derive(Debug)]
pub struct Flow {
    limit: AtomicU64,
    throttled: AtomicU64,
}

impl Flow {
    /// At first so many calls at once.
    pub fn new(limit: u64) -> Self {
        Flow { limit: AtomicU64::new(limit), throttled: AtomicU64::new(0) }
    }

    /// From now on so many calls at once.
    pub fn limit(&self, calls: u64) {
        self.limit.store(calls, Ordering::Relaxed);
    }

    /// The backend asked one more call to slow down.
    pub fn throttled(&self) {
        self.throttled.fetch_add(1, Ordering::Relaxed);
    }
}

/// The metrics of one process. A clone records into the same place.
#[derive(Clone)]
pub struct Metrics(Arc<Instruments>);

struct Instruments {
    registry: Registry,
    /// Keeps the pipeline between instruments and registry alive.
    _provider: SdkMeterProvider,
    reads: Histogram<f64>,
    backend_requests: Counter<u64>,
    unauthenticated: Counter<u64>,
    sync_durations: Histogram<f64>,
    sync_runs: Counter<u64>,
    cache_lookups: Counter<u64>,
    gauges: Arc<Gauges>,
}

/// Not yet known, so not reported.
const UNKNOWN: u64 = u64::MAX;

#[derive(Default)]
struct Gauges {
    audit_backlog: AtomicU64,
    leases: AtomicU64,
    connected: Reading,
    cache_entries: Reading,
    cache_bytes: Reading,
    backends: Mutex<Vec<Weak<BackendSeries>>>,
    nodes: Mutex<Vec<Weak<NodeSeries>>>,
}

/// A number that may be unknown.
struct Reading(AtomicU64);

impl Default for Reading {
    fn default() -> Self {
        Reading(AtomicU64::new(UNKNOWN))
    }
}

impl Reading {
    fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|value| *value != UNKNOWN)
    }

    fn tell(&self, observer: &dyn AsyncInstrument<u64>, labels: &[KeyValue]) {
        self.get().into_iter().for_each(|value| observer.observe(value, labels));
    }
}

struct BackendSeries {
    labels: [KeyValue; 2],
    up: Reading,
    breaker: Reading,
    last_sync: Reading,
    conflicts: Reading,
    staleness: Reading,
    flow: Mutex<Option<Arc<Flow>>>,
    secrets: Mutex<Vec<(&'static str, u64)>>,
}

struct NodeSeries {
    labels: [KeyValue; 1],
    desired: AtomicU64,
    in_force: AtomicU64,
}

/// The series of one backend; they are reported as long as somebody holds this.
#[derive(Clone)]
pub struct BackendMetrics {
    series: Arc<BackendSeries>,
    instruments: Arc<Instruments>,
}

/// The series of one data-plane node; they are reported as long as somebody holds this.
#[derive(Clone)]
pub struct NodeMetrics(Arc<NodeSeries>);

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Sets up the instruments of a process.
    pub fn new() -> Self {
        let registry = Registry::new();
        let exporter = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            // Names below are written as Prometheus shows them.
            .without_units()
            .without_counter_suffixes()
            .without_target_info()
            .scope_info_enabled(false)
            .build()
            .expect("the registry is new and takes its first collector");
        let provider = SdkMeterProvider::builder().with_reader(exporter).build();
        let meter = provider.meter("scaivault");
        let gauges = Arc::new(Gauges::default());
        gauges.observe(&meter);
        Metrics(Arc::new(Instruments {
            reads: meter
                .f64_histogram("scaivault_read_duration_seconds")
                .with_description("Reads of secrets, from the request to the outcome")
                .with_boundaries(READ_SECONDS.to_vec())
                .build(),
            backend_requests: meter
                .u64_counter("scaivault_backend_requests_total")
                .with_description("Calls to backends")
                .build(),
            unauthenticated: meter
                .u64_counter("scaivault_unauthenticated_requests_total")
                .with_description("Requests without a valid token, which the audit trail does not hold")
                .build(),
            sync_durations: meter
                .f64_histogram("scaivault_sync_duration_seconds")
                .with_description("Sync runs, from their begin to their outcome")
                .with_boundaries(SYNC_SECONDS.to_vec())
                .build(),
            sync_runs: meter
                .u64_counter("scaivault_sync_runs_total")
                .with_description("Sync runs that ended")
                .build(),
            cache_lookups: meter
                .u64_counter("scaivault_cache_lookups_total")
                .with_description("Reads that asked the cache")
                .build(),
            registry,
            _provider: provider,
            gauges,
        }))
    }

    /// Everything in the text format of Prometheus.
    pub fn render(&self) -> String {
        TextEncoder::new().encode_to_string(&self.0.registry.gather()).unwrap_or_else(|error| {
            tracing::error!(%error, "the metrics cannot be written");
            String::new()
        })
    }

    /// A read took this long. `source` is where the path lives, if the request came that far.
    pub fn read(&self, source: Option<Source>, outcome: Result<(), Reason>, took: Duration) {
        let labels = [
            KeyValue::new("mode", source.map_or("none", Source::as_str)),
            KeyValue::new("outcome", outcome.map_or_else(Reason::code, |()| "ok")),
        ];
        self.0.reads.record(took.as_secs_f64(), &labels);
    }

    /// A request came without a valid token.
    pub fn unauthenticated(&self) {
        self.0.unauthenticated.add(1, &[]);
    }

    /// This many bytes of audit rows wait to be shipped.
    pub fn audit_backlog(&self, bytes: u64) {
        self.0.gauges.audit_backlog.store(bytes, Ordering::Relaxed);
    }

    /// This many leases are held.
    pub fn leases_held(&self, count: u64) {
        self.0.gauges.leases.store(count, Ordering::Relaxed);
    }

    /// The stream to the control plane went up or down. Not reported before the first call.
    pub fn control_plane(&self, health: Health) {
        self.0.gauges.connected.set(health as u64);
    }

    /// The cache holds this much.
    pub fn cache(&self, entries: u64, bytes: u64) {
        self.0.gauges.cache_entries.set(entries);
        self.0.gauges.cache_bytes.set(bytes);
    }

    /// A read asked the cache.
    pub fn cache_lookup(&self, lookup: Lookup) {
        self.0.cache_lookups.add(1, &[KeyValue::new("outcome", lookup.as_str())]);
    }

    /// The series of a backend. The label is the id, because names repeat across tenants.
    pub fn backend(&self, id: &BackendId, kind: &'static str) -> BackendMetrics {
        let series = Arc::new(BackendSeries {
            labels: [KeyValue::new("backend", shared(id.as_str())), KeyValue::new("type", kind)],
            up: Reading::default(),
            breaker: Reading::default(),
            last_sync: Reading::default(),
            conflicts: Reading::default(),
            staleness: Reading::default(),
            flow: Mutex::default(),
            secrets: Mutex::default(),
        });
        self.0.gauges.backends.enlist(&series);
        BackendMetrics { series, instruments: self.0.clone() }
    }

    /// The series of a data-plane node.
    pub fn node(&self, name: &NodeName) -> NodeMetrics {
        let series = Arc::new(NodeSeries {
            labels: [KeyValue::new("node", shared(name.as_str()))],
            desired: AtomicU64::new(0),
            in_force: AtomicU64::new(0),
        });
        self.0.gauges.nodes.enlist(&series);
        NodeMetrics(series)
    }
}

impl BackendMetrics {
    /// The backend was called. `operation` is e.g. `read`, `outcome` is `ok` or the class of the failure.
    pub fn request(&self, operation: &'static str, outcome: &'static str) {
        let [backend, kind] = self.series.labels.clone();
        let labels =
            [backend, kind, KeyValue::new("operation", operation), KeyValue::new("outcome", outcome)];
        self.instruments.backend_requests.add(1, &labels);
    }

    /// Whether it answers. Not reported before the first call.
    pub fn health(&self, health: Health) {
        self.series.up.set(health as u64);
    }

    /// The state of its breaker. Not reported before the first call.
    pub fn breaker(&self, breaker: Breaker) {
        self.series.breaker.set(breaker as u64);
    }

    /// Calls of it go through this. Not reported before the first call.
    pub fn flow(&self, flow: Arc<Flow>) {
        *self.series.flow.lock().unwrap_or_else(PoisonError::into_inner) = Some(flow);
    }

    /// A sync run ended; `outcome` is e.g. `complete`.
    pub fn sync_run(&self, outcome: &'static str, took: Duration) {
        let [backend, kind] = self.series.labels.clone();
        let labels = [backend, kind, KeyValue::new("outcome", outcome)];
        self.instruments.sync_durations.record(took.as_secs_f64(), &labels);
        self.instruments.sync_runs.add(1, &labels);
    }

    /// A sync run compared everything, and ended then. Not reported before the first call.
    pub fn sync_succeeded(&self, at: Timestamp) {
        self.series.last_sync.set(u64::try_from(at.as_millis() / 1000).unwrap_or_default());
    }

    /// How many secrets are in which state, e.g. `synced` or `skipped`. States that are not named are no longer reported.
    pub fn sync_secrets(&self, states: &[(&'static str, u64)]) {
        *self.series.secrets.lock().unwrap_or_else(PoisonError::into_inner) = states.to_vec();
    }

    /// This many conflicts wait to be resolved. Not reported before the first call.
    pub fn conflicts_open(&self, count: u64) {
        self.series.conflicts.set(count);
    }

    /// The age of the oldest copy that a read could be answered with. Not reported before the first call.
    pub fn cache_staleness(&self, oldest: Duration) {
        self.series.staleness.set(oldest.as_secs());
    }
}

impl NodeMetrics {
    /// The generation that the node should serve and the one that it does, each summed over its tenants: the two are
    /// equal exactly when every tenant's configuration is in force.
    pub fn generation(&self, desired: u64, in_force: u64) {
        self.0.desired.store(desired, Ordering::Relaxed);
        self.0.in_force.store(in_force, Ordering::Relaxed);
    }
}

/// Text that a label can share instead of copying.
fn shared(text: &str) -> Arc<str> {
    text.into()
}

trait Enlist<T> {
    fn enlist(&self, series: &Arc<T>);
    fn living(&self) -> Vec<Arc<T>>;
}

impl<T> Enlist<T> for Mutex<Vec<Weak<T>>> {
    fn enlist(&self, series: &Arc<T>) {
        self.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(series));
    }

    fn living(&self) -> Vec<Arc<T>> {
        let mut list = self.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|series| series.strong_count() > 0);
        list.iter().filter_map(Weak::upgrade).collect()
    }
}

impl Gauges {
    fn observe(self: &Arc<Self>, meter: &Meter) {
        let gauge =
            |name: &'static str, about: &'static str, read: fn(&Gauges, &dyn AsyncInstrument<u64>)| {
                let gauges = self.clone();
                meter
                    .u64_observable_gauge(name)
                    .with_description(about)
                    .with_callback(move |observer| read(&gauges, observer))
                    .build();
            };
        gauge("scaivault_backend_up", "1 if the backend answers", |gauges, observer| {
            gauges.of_backends(|backend| &backend.up, observer);
        });
        gauge("scaivault_breaker_state", "0 closed, 1 half open, 2 open", |gauges, observer| {
            gauges.of_backends(|backend| &backend.breaker, observer);
        });
        gauge(
            "scaivault_backend_concurrency_limit",
            "Most calls of the backend at once",
            |gauges, observer| {
                gauges.of_flows(|flow| &flow.limit, observer);
            },
        );
        let gauges = self.clone();
        meter
            .u64_observable_counter("scaivault_backend_throttled_total")
            .with_description("Calls that the backend asked to slow down")
            .with_callback(move |observer| gauges.of_flows(|flow| &flow.throttled, observer))
            .build();
        let about = "When a sync run last compared everything, in seconds since 1970";
        gauge("scaivault_sync_last_success_timestamp_seconds", about, |gauges, observer| {
            gauges.of_backends(|backend| &backend.last_sync, observer);
        });
        gauge("scaivault_sync_secrets", "Secrets in sync mode, by state", |gauges, observer| {
            for backend in gauges.backends.living() {
                for (state, count) in &*backend.secrets.lock().unwrap_or_else(PoisonError::into_inner) {
                    let [id, kind] = backend.labels.clone();
                    observer.observe(*count, &[id, kind, KeyValue::new("state", *state)]);
                }
            }
        });
        gauge("scaivault_conflicts_open", "Conflicts that wait to be resolved", |gauges, observer| {
            gauges.of_backends(|backend| &backend.conflicts, observer);
        });
        gauge("scaivault_cache_staleness_seconds", "The age of the oldest copy", |gauges, observer| {
            gauges.of_backends(|backend| &backend.staleness, observer);
        });
        gauge("scaivault_cache_entries", "Secrets in the cache", |gauges, observer| {
            gauges.cache_entries.tell(observer, &[]);
        });
        gauge("scaivault_cache_bytes", "What the cache takes on disk", |gauges, observer| {
            gauges.cache_bytes.tell(observer, &[]);
        });
        gauge("scaivault_generation_desired", "The configuration a node should serve", |gauges, observer| {
            for node in gauges.nodes.living() {
                observer.observe(node.desired.load(Ordering::Relaxed), &node.labels);
            }
        });
        gauge("scaivault_generation_in_force", "The configuration a node serves", |gauges, observer| {
            for node in gauges.nodes.living() {
                observer.observe(node.in_force.load(Ordering::Relaxed), &node.labels);
            }
        });
        gauge("scaivault_audit_backlog_bytes", "Audit rows that wait to be shipped", |gauges, observer| {
            observer.observe(gauges.audit_backlog.load(Ordering::Relaxed), &[]);
        });
        gauge("scaivault_leases_held", "Leases in memory", |gauges, observer| {
            observer.observe(gauges.leases.load(Ordering::Relaxed), &[]);
        });
        gauge("scaivault_control_plane_connected", "1 if the stream is up", |gauges, observer| {
            gauges.connected.tell(observer, &[]);
        });
    }

    /// One number of how every backend is called.
    fn of_flows(&self, number: fn(&Flow) -> &AtomicU64, observer: &dyn AsyncInstrument<u64>) {
        for backend in self.backends.living() {
            if let Some(flow) = &*backend.flow.lock().unwrap_or_else(PoisonError::into_inner) {
                observer.observe(number(flow).load(Ordering::Relaxed), &backend.labels);
            }
        }
    }

    /// One reading of every backend.
    fn of_backends(&self, reading: fn(&BackendSeries) -> &Reading, observer: &dyn AsyncInstrument<u64>) {
        for backend in self.backends.living() {
            reading(&backend).tell(observer, &backend.labels);
        }
    }
}

macro_rules! opaque {
    ($($type:ty),+) => {
        $(impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($type)).finish_non_exhaustive()
            }
        })+
    };
}

opaque!(Metrics, BackendMetrics, NodeMetrics);

#[cfg(test)]
mod tests {
    use scaivault_domain::backend::ProviderKind;

    use super::*;

    fn series(text: &str, name: &str) -> Vec<String> {
        text.lines().filter(|line| line.starts_with(name)).map(str::to_owned).collect()
    }

    #[test]
    fn everything_that_operators_watch_is_rendered() {
        let metrics = Metrics::new();
        let backend =
            metrics.backend(&BackendId::from_random([0; 10]), ProviderKind::HashicorpVault.as_str());
        let node = metrics.node(&NodeName::parse("edge-1").expect("a name"));
        metrics.read(Some(Source::Proxy), Ok(()), Duration::from_millis(3));
        metrics.read(None, Err(Reason::PermissionDenied), Duration::from_micros(9));
        metrics.unauthenticated();
        metrics.audit_backlog(4096);
        metrics.leases_held(2);
        metrics.control_plane(Health::Up);
        backend.request("read", "ok");
        backend.request("read", "ok");
        backend.health(Health::Up);
        backend.breaker(Breaker::HalfOpen);
        node.generation(7, 6);
        let flow = Arc::new(Flow::new(64));
        backend.flow(flow.clone());
        flow.limit(32);
        flow.throttled();
        backend.sync_run("complete", Duration::from_secs(2));
        backend.sync_succeeded(Timestamp::from_millis(1_700_000_000_999));
        backend.sync_secrets(&[("synced", 40), ("failed", 9)]);
        backend.sync_secrets(&[("synced", 42), ("skipped", 1)]);
        backend.conflicts_open(3);
        backend.cache_staleness(Duration::from_millis(61_500));
        metrics.cache(42, 9000);
        metrics.cache_lookup(Lookup::Hit);
        metrics.cache_lookup(Lookup::Absent);

        let text = metrics.render();
        for line in [
            r#"scaivault_read_duration_seconds_count{mode="proxy",outcome="ok"} 1"#,
            r#"scaivault_read_duration_seconds_bucket{mode="proxy",outcome="ok",le="0.005"} 1"#,
            r#"scaivault_read_duration_seconds_count{mode="none",outcome="permission_denied"} 1"#,
            r#"scaivault_backend_requests_total{backend="fed_aaaaaaaaaaaaaaaa",operation="read",outcome="ok",type="hashicorp-vault"} 2"#,
            r#"scaivault_backend_up{backend="fed_aaaaaaaaaaaaaaaa",type="hashicorp-vault"} 1"#,
            r#"scaivault_breaker_state{backend="fed_aaaaaaaaaaaaaaaa",type="hashicorp-vault"} 1"#,
            r#"scaivault_backend_concurrency_limit{backend="fed_aaaaaaaaaaaaaaaa",type="hashicorp-vault"} 32"#,
            r#"scaivault_backend_throttled_total{backend="fed_aaaaaaaaaaaaaaaa",type="hashicorp-vault"} 1"#,
            r#"scaivault_generation_desired{node="edge-1"} 7"#,
            r#"scaivault_generation_in_force{node="edge-1"} 6"#,
            "scaivault_audit_backlog_bytes 4096",
            "scaivault_control_plane_connected 1",
            "scaivault_unauthenticated_requests_total 1",
            "scaivault_leases_held 2",
            r#"scaivault_sync_duration_seconds_count{backend="fed_aaaaaaaaaaaaaaaa",outcome="complete",type="hashicorp-vault"} 1"#,
            r#"scaivault_sync_runs_total{backend="fed_aaaaaaaaaaaaaaaa",outcome="complete",type="hashicorp-vault"} 1"#,
            r#"scaivault_sync_last_success_timestamp_seconds{backend="fed_aaaaaaaaaaaaaaaa",type="hashicorp-vault"} 1700000000"#,
            r#"scaivault_sync_secrets{backend="fed_aaaaaaaaaaaaaaaa",state="synced",type="hashicorp-vault"} 42"#,
            r#"scaivault_sync_secrets{backend="fed_aaaaaaaaaaaaaaaa",state="skipped",type="hashicorp-vault"} 1"#,
            r#"scaivault_conflicts_open{backend="fed_aaaaaaaaaaaaaaaa",type="hashicorp-vault"} 3"#,
            r#"scaivault_cache_staleness_seconds{backend="fed_aaaaaaaaaaaaaaaa",type="hashicorp-vault"} 61"#,
            r#"scaivault_cache_lookups_total{outcome="hit"} 1"#,
            r#"scaivault_cache_lookups_total{outcome="absent"} 1"#,
            "scaivault_cache_entries 42",
            "scaivault_cache_bytes 9000",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert_eq!(series(&text, "scaivault_sync_secrets{").len(), 2, "{text}");
    }

    #[test]
    fn labels_are_a_closed_set_and_nothing_is_exemplified() {
        let metrics = Metrics::new();
        metrics.read(Some(Source::Local), Ok(()), Duration::from_millis(1));
        let backend =
            metrics.backend(&BackendId::from_random([1; 10]), ProviderKind::HashicorpVault.as_str());
        backend.request("login", "auth");
        backend.sync_run("failed", Duration::ZERO);
        backend.sync_secrets(&[("synced", 0)]);
        metrics.cache_lookup(Lookup::Miss);
        let text = metrics.render();
        let known = ["backend", "type", "mode", "outcome", "operation", "node", "state", "le"];
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            assert!(!line.contains(" # "), "{line}");
            let labels = line.split_once('{').map_or("", |(_, rest)| rest.split('}').next().unwrap_or(""));
            for label in labels.split(',').filter(|label| !label.is_empty()) {
                let name = label.split('=').next().unwrap_or("");
                assert!(known.contains(&name), "{line}");
            }
        }
    }

    #[test]
    fn a_removed_backend_is_no_longer_reported() {
        let metrics = Metrics::new();
        let backend =
            metrics.backend(&BackendId::from_random([2; 10]), ProviderKind::HashicorpVault.as_str());
        backend.health(Health::Down);
        assert_eq!(series(&metrics.render(), "scaivault_backend_up").len(), 1);
        drop(backend);
        assert_eq!(series(&metrics.render(), "scaivault_backend_up").len(), 0);
    }

    #[test]
    fn what_is_not_known_is_not_reported() {
        let metrics = Metrics::new();
        let _backend =
            metrics.backend(&BackendId::from_random([3; 10]), ProviderKind::HashicorpVault.as_str());
        let text = metrics.render();
        assert!(series(&text, "scaivault_backend_up").is_empty(), "{text}");
        assert!(series(&text, "scaivault_control_plane_connected").is_empty(), "{text}");
        assert!(
            series(&text, "scaivault_cache").is_empty() && series(&text, "scaivault_sync").is_empty(),
            "{text}"
        );
    }
}

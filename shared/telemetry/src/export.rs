//! The way of spans to a collector: OTLP over gRPC, in batches, by a thread of its own.
//!
//! Spans wait in a bounded queue; what does not fit, or is not taken, is lost, and no request waits for it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry::trace::{Status, TracerProvider as _};
use opentelemetry::{Key, KeyValue};
use opentelemetry_otlp::tonic_types::transport::ClientTlsConfig;
use opentelemetry_otlp::{SpanExporter as Otlp, WithExportConfig as _, WithTonicConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::resource::{EnvResourceDetector, ResourceDetector as _};
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, SpanData, SpanEvents, SpanExporter, SpanLinks};
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::registry::LookupSpan;

use crate::logs::InitError;
use crate::trace::{FIELDS, TARGET};

/// How long a process that stops waits for its last spans to be taken.
const LAST_SPANS: Duration = Duration::from_secs(3);
/// How often a collector that takes nothing is complained about.
const COMPLAINTS: Duration = Duration::from_secs(60);

/// What to do with traces. The variables of OpenTelemetry hold for what is not said here: `OTEL_SERVICE_NAME` and
/// `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER` and its `_ARG`, `OTEL_EXPORTER_OTLP_HEADERS`, `_TIMEOUT` and
/// `_COMPRESSION`, `OTEL_BSP_*`, `OTEL_SDK_DISABLED`.
#[derive(Clone, Debug, Default)]
pub struct TraceConfig {
    /// What this process is called, unless the environment calls it otherwise.
    pub service: &'static str,
    /// The collector, which speaks OTLP over gRPC, e.g. `http://localhost:4317`. Without one nothing is traced.
    pub endpoint: Option<String>,
    /// The share of the traces that begin here which is exported, 0 to 1. Callers have decided about theirs.
    pub sample_ratio: Option<f64>,
}

/// The export of a process' spans.
#[derive(Debug)]
#[must_use = "the last spans leave with `flush`"]
pub struct Traces(Option<SdkTracerProvider>);

impl Traces {
    /// Starts what `config` asks for. Within a tokio runtime, which carries the spans.
    pub(crate) fn start(config: TraceConfig) -> Result<Self, InitError> {
        if let Some(ratio) = config.sample_ratio
            && !(0.0..=1.0).contains(&ratio)
        {
            return Err(InitError::SampleRatio(ratio));
        }
        let disabled = std::env::var("OTEL_SDK_DISABLED").is_ok_and(|text| text.eq_ignore_ascii_case("true"));
        let Some(endpoint) = config.endpoint.filter(|text| !text.is_empty() && !disabled) else {
            return Ok(Traces(None));
        };
        let mut exporter = Otlp::builder().with_tonic().with_endpoint(&endpoint);
        if !endpoint.starts_with("http://") {
            exporter = exporter.with_tls_config(ClientTlsConfig::new().with_enabled_roots());
        }
        let exporter = exporter.build().map_err(InitError::Endpoint)?;
        let mut provider = SdkTracerProvider::builder()
            .with_batch_exporter(Outgoing::new(exporter))
            .with_resource(resource(config.service));
        if let Some(ratio) = config.sample_ratio {
            let root = Box::new(Sampler::TraceIdRatioBased(ratio));
            provider = provider.with_sampler(Sampler::ParentBased(root));
        }
        Ok(Traces(Some(provider.build())))
    }

    /// The layer that exports the spans of [`crate::trace`], and nothing else.
    pub(crate) fn layer<S>(&self) -> Option<impl Layer<S> + Send + Sync + use<S>>
    where
        S: Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        let tracer = self.0.as_ref()?.tracer("scaivault");
        let ours = filter_fn(|metadata| metadata.is_span() && metadata.target() == TARGET);
        let layer = tracing_opentelemetry::layer()
            .with_tracer(tracer)
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_tracked_inactivity(false);
        Some(layer.with_filter(ours.with_max_level_hint(LevelFilter::INFO)))
    }

    /// Ends the export: the last spans are sent, within three seconds.
    pub async fn flush(self) {
        let Some(provider) = self.0 else { return };
        // The SDK itself tells what was not taken in time.
        let _ = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(LAST_SPANS)).await;
    }
}

fn resource(service: &'static str) -> Resource {
    let name = Key::from_static_str("service.name");
    let named = std::env::var("OTEL_SERVICE_NAME").is_ok_and(|text| !text.is_empty())
        || EnvResourceDetector::new().detect().get(&name).is_some();
    let resource =
        Resource::builder().with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
    if named { resource.build() } else { resource.with_service_name(service).build() }
}

/// Lets through what a span may tell, and keeps the failures of the exporter within bounds.
#[derive(Debug)]
struct Outgoing<E> {
    exporter: E,
    failures: Mutex<Failures>,
}

#[derive(Debug, Default)]
struct Failures {
    lost: usize,
    told: Option<Instant>,
}

impl Failures {
    /// The number of spans that were lost since it was last told, if it is to be told now.
    fn count(&mut self, lost: usize, now: Instant) -> Option<usize> {
        self.lost += lost;
        if self.told.is_some_and(|told| now.duration_since(told) < COMPLAINTS) {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.lost))
    }
}

impl<E> Outgoing<E> {
    fn new(exporter: E) -> Self {
        Outgoing { exporter, failures: Mutex::default() }
    }

    fn failed(&self, spans: usize, error: &OTelSdkError) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lost) = failures.count(spans, Instant::now()) {
            tracing::warn!(%error, lost, "the collector of traces does not take spans");
        }
    }
}

impl<E: SpanExporter> SpanExporter for Outgoing<E> {
    async fn export(&self, mut batch: Vec<SpanData>) -> OTelSdkResult {
        batch.iter_mut().for_each(reduce);
        let spans = batch.len();
        if let Err(error) = self.exporter.export(batch).await {
            self.failed(spans, &error);
        }
        // Told above; whoever else is told would write a line for every batch.
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// Takes from a span whatever it is not known to tell, however it got there.
fn reduce(span: &mut SpanData) {
    span.attributes.retain(|attribute| FIELDS.contains(&attribute.key.as_str()));
    span.events = SpanEvents::default();
    span.links = SpanLinks::default();
    if let Status::Error { description } = &mut span.status {
        *description = "".into();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http::{HeaderMap, StatusCode};
    use scaivault_domain::backend::BackendId;
    use tracing::subscriber::with_default;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;
    use crate::trace::{Remote, ServerSpan, backend_call, inject, sync_run};

    /// Keeps what is exported.
    #[derive(Clone, Debug, Default)]
    struct Kept(Arc<Mutex<Vec<SpanData>>>);

    impl SpanExporter for Kept {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().expect("nobody panicked").extend(batch);
            Ok(())
        }
    }

    /// Does `work` while spans are exported, and returns those.
    fn exported(work: impl FnOnce()) -> Vec<SpanData> {
        let kept = Kept::default();
        let provider = SdkTracerProvider::builder()
            .with_simple_exporter(Outgoing::new(kept.clone()))
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)))
            .build();
        let layer = Traces(Some(provider)).layer();
        with_default(tracing_subscriber::registry().with(layer), work);
        std::mem::take(&mut kept.0.lock().expect("nobody panicked"))
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime").block_on(work)
    }

    const GET: &str = "/scaivault.secrets.v1.SecretsService/Get";

    fn caller(flags: &str) -> HeaderMap {
        let parent = format!("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-{flags}");
        HeaderMap::from_iter([(http::HeaderName::from_static("traceparent"), parent.parse().expect("text"))])
    }

    #[test]
    fn a_span_is_the_child_of_its_caller_and_the_parent_of_what_it_calls() {
        let (headers, mut outgoing) = (caller("01"), HeaderMap::new());
        let spans = exported(|| {
            let span =
                ServerSpan::http("GET", "/v1/secrets/{*path}", Remote::from_headers(&headers).as_ref());
            assert_eq!(span.trace_id().as_deref(), Some("4bf92f3577b34da6a3ce929d0e0e4736"));
            run(span.around(async { inject(&mut outgoing) }));
            span.answered(StatusCode::SERVICE_UNAVAILABLE, None);
        });
        let [span] = spans.as_slice() else { panic!("{spans:?}") };
        assert_eq!(
            (span.name.as_ref(), span.parent_span_id.to_string().as_str()),
            ("GET /v1/secrets/{*path}", "00f067aa0ba902b7")
        );
        assert_eq!(span.status, Status::error(""));
        let onward = Remote::from_headers(&outgoing).expect("it was injected");
        assert_eq!(onward.trace_id(), span.span_context.trace_id().to_string());
        assert!(
            outgoing["traceparent"]
                .to_str()
                .is_ok_and(|text| { text.contains(&span.span_context.span_id().to_string()) })
        );
    }

    #[test]
    fn the_caller_decides_whether_its_trace_is_exported() {
        let (headers, mut outgoing) = (caller("00"), HeaderMap::new());
        let spans = exported(|| {
            let span = ServerSpan::grpc(GET, Remote::from_headers(&headers).as_ref());
            assert_eq!(span.trace_id().as_deref(), Some("4bf92f3577b34da6a3ce929d0e0e4736"));
            run(span.around(async { inject(&mut outgoing) }));
        });
        assert!(spans.is_empty(), "{spans:?}");
        assert!(outgoing["traceparent"].to_str().is_ok_and(|text| text.ends_with("-00")), "{outgoing:?}");
    }

    #[test]
    fn neither_log_lines_nor_other_spans_nor_unknown_fields_leave() {
        let spans = exported(|| {
            let span = ServerSpan::grpc(GET, None);
            run(span.around(async {
                let _log = tracing::info_span!("request", path = "canary").entered();
                tracing::error!(value = "canary", "canary");
                tracing::error!(target: "vaultrs::client", "canary");
                let known = tracing::info_span!(target: "scaivault::trace", "backend", secret = "canary", outcome = "ok");
                known.in_scope(|| tracing::error!(target: TARGET, "canary"));
            }));
            span.answered(StatusCode::OK, None);
        });
        assert_eq!(spans.len(), 2, "{spans:?}");
        assert!(!format!("{spans:?}").contains("canary"), "{spans:?}");
        assert_eq!(spans[0].parent_span_id, spans[1].span_context.span_id());
        assert_eq!(spans[0].attributes, [KeyValue::new("outcome", "ok")]);
    }

    #[test]
    fn a_call_of_a_backend_has_a_span_in_a_trace_and_none_elsewhere() {
        let backend = BackendId::from_random([0; 10]);
        let call = async |outcome: Result<(), &'static str>| {
            let call = async move { outcome };
            let _ = backend_call(&backend, "hashicorp-vault", "read", |class| class, call).await;
        };
        let spans = exported(|| {
            run(async {
                call(Ok(())).await;
                ServerSpan::http("GET", "/v1/secrets/{*path}", None).around(call(Err("transient"))).await;
                sync_run(&backend, "hashicorp-vault", |()| "complete", call(Ok(()))).await;
            });
        });
        let told = |span: &SpanData| {
            let outcome = span.attributes.iter().find(|attribute| attribute.key.as_str() == "outcome");
            (span.name.to_string(), outcome.map(|attribute| attribute.value.to_string()))
        };
        let [failed, server, read, sync] = spans.as_slice() else { panic!("{spans:?}") };
        assert_eq!(told(failed), ("backend.read".to_owned(), Some("transient".to_owned())));
        assert_eq!(told(read), ("backend.read".to_owned(), Some("ok".to_owned())));
        assert_eq!(told(sync), ("sync".to_owned(), Some("complete".to_owned())));
        assert_eq!(failed.parent_span_id, server.span_context.span_id());
        assert_eq!(read.parent_span_id, sync.span_context.span_id());
        assert_eq!((&failed.status, &read.status), (&Status::error(""), &Status::Unset));
    }

    #[test]
    fn a_call_that_is_given_up_is_told_as_such() {
        let backend = BackendId::from_random([0; 10]);
        let spans = exported(|| {
            let given_up = async {
                let never = std::future::pending::<Result<(), &'static str>>();
                let call = backend_call(&backend, "hashicorp-vault", "read", |class| class, never);
                let _ = tokio::time::timeout(Duration::ZERO, call).await;
            };
            run(ServerSpan::http("GET", "/v1/secrets/{*path}", None).around(given_up));
        });
        assert_eq!(spans[0].name, "backend.read");
        assert!(spans[0].attributes.contains(&KeyValue::new("outcome", "abandoned")), "{spans:?}");
        assert_eq!(spans[0].status, Status::error(""));
    }

    #[test]
    fn a_collector_that_fails_is_complained_about_once_a_minute() {
        let (mut failures, start) = (Failures::default(), Instant::now());
        assert_eq!(failures.count(3, start), Some(3));
        assert_eq!(failures.count(5, start + COMPLAINTS / 2), None);
        assert_eq!(failures.count(7, start + COMPLAINTS), Some(12));
    }

    #[test]
    fn without_a_collector_there_is_nothing_to_export_to() {
        let traces = Traces::start(TraceConfig::default()).expect("nothing is wrong");
        assert!(traces.0.is_none() && traces.layer::<tracing_subscriber::Registry>().is_none());
        let blank = TraceConfig { endpoint: Some(String::new()), ..TraceConfig::default() };
        assert!(Traces::start(blank).expect("nothing is wrong").0.is_none());
        for ratio in [-0.1, 1.1, f64::NAN] {
            let wrong = TraceConfig { sample_ratio: Some(ratio), ..TraceConfig::default() };
            assert!(matches!(Traces::start(wrong), Err(InitError::SampleRatio(_))));
        }
    }
}

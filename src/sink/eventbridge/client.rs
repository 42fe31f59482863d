//! The AWS client, and when its credentials are looked for anew.

use std::env;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_eventbridge::Client;
use aws_sdk_eventbridge::config::retry::RetryConfig;
use aws_sdk_eventbridge::config::timeout::TimeoutConfig;
use aws_sdk_eventbridge::config::{SharedHttpClient, StalledStreamProtectionConfig};
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};

use crate::sink::eventbridge::{ENDPOINT_VARIABLES, EventBridgeConfig};

/// Shorter than a publish call's timeout, so that an unreachable endpoint is seen as just that: nothing was sent.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A request that meets the server closing an idle connection has an unknown fate, so we close first.
const IDLE_CONNECTION: Duration = Duration::from_secs(15);

/// The client of the moment.
pub(super) struct CurrentClient {
    client: Mutex<Client>,
    /// It came from AWS's usual places, which may hold something else by now.
    renewable: bool,
    refused: AtomicBool,
}

impl CurrentClient {
    /// With credentials, region and endpoint from AWS's usual places.
    pub(super) async fn from_environment(config: &EventBridgeConfig) -> Self {
        Self { renewable: true, ..Self::with_sdk_config(&load(config).await, config) }
    }

    /// With what `sdk` holds.
    pub(super) fn with_sdk_config(sdk: &SdkConfig, config: &EventBridgeConfig) -> Self {
        Self { client: Mutex::new(client(sdk, config)), renewable: false, refused: AtomicBool::new(false) }
    }

    pub(super) fn get(&self) -> Client {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// AWS refused what it holds, or found nothing in it.
    pub(super) fn refused(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    /// After a refusal: the SDK reads a file of credentials once, and would go on with what has been replaced there since.
    pub(super) async fn renew_if_refused(&self, config: &EventBridgeConfig) {
        if self.renewable && self.refused.load(Ordering::Relaxed) {
            let renewed = client(&load(config).await, config);
            *self.client.lock().unwrap_or_else(PoisonError::into_inner) = renewed;
            self.refused.store(false, Ordering::Relaxed);
        }
    }
}

async fn load(config: &EventBridgeConfig) -> SdkConfig {
    // A fixed version: an update of the SDK must not change its defaults under a relay.
    let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12()).http_client(http_client());
    if let Some(region) = &config.region {
        loader = loader.region(Region::new(region.clone()));
    }
    loader.load().await
}

fn client(sdk: &SdkConfig, config: &EventBridgeConfig) -> Client {
    let mut builder = aws_sdk_eventbridge::config::Builder::from(sdk)
        // The engine owns the retries; the SDK's own would multiply them, and repeat what has an unknown outcome.
        .retry_config(RetryConfig::disabled())
        // Whole calls are bounded by the sink, by the deadline too.
        .timeout_config(TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).build())
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
    if sdk.http_client().is_none() {
        builder = builder.http_client(http_client());
    }
    if let Some(region) = &config.region {
        builder = builder.region(Region::new(region.clone()));
    }
    // `AWS_ENDPOINT_URL=` is how unit files write "none", and the SDK's requests panic over an empty URL.
    let empty = || ENDPOINT_VARIABLES.iter().find_map(|name| env::var(name).ok()).is_some_and(|url| url.is_empty());
    if config.endpoint_url.is_some() || empty() {
        builder.set_endpoint_url(config.endpoint_url.clone().filter(|url| !url.is_empty()));
    }
    Client::from_conf(builder.build())
}

/// One client for EventBridge and for the credential providers: rustls with ring, and plain `http://` as well.
fn http_client() -> SharedHttpClient {
    aws_smithy_http_client::Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .pool_idle_timeout(IDLE_CONNECTION)
        .build_https()
}

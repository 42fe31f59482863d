//! The AWS client. After AWS has refused its credentials, they are loaded again.

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

/// The longest wait for a connection. It is shorter than the timeout of a publish call, so that an unreachable endpoint is
/// reported as such: nothing was sent.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The time after which the relay closes an idle connection. If the server closed it while a request is sent, the outcome of the
/// request would be unknown.
const IDLE_CONNECTION: Duration = Duration::from_secs(15);

/// The client, which is replaced when AWS has refused its credentials.
pub(super) struct CurrentClient {
    client: Mutex<Client>,
    /// Whether the credentials came from AWS's usual places, which may hold others by now.
    renewable: bool,
    refused: AtomicBool,
}

impl CurrentClient {
    /// Returns a client with credentials, region and endpoint from AWS's usual places.
    pub(super) async fn from_environment(config: &EventBridgeConfig) -> Self {
        Self { renewable: true, ..Self::with_sdk_config(&load(config).await, config) }
    }

    /// Returns a client with the settings of `sdk`.
    pub(super) fn with_sdk_config(sdk: &SdkConfig, config: &EventBridgeConfig) -> Self {
        Self { client: Mutex::new(client(sdk, config)), renewable: false, refused: AtomicBool::new(false) }
    }

    pub(super) fn get(&self) -> Client {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// To be called when AWS has refused the credentials, or there are none.
    pub(super) fn refused(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    /// Loads the credentials again after a refusal. The SDK reads a file of credentials only once, and would not notice that the
    /// file has changed.
    pub(super) async fn renew_if_refused(&self, config: &EventBridgeConfig) {
        if self.renewable && self.refused.load(Ordering::Relaxed) {
            let renewed = client(&load(config).await, config);
            *self.client.lock().unwrap_or_else(PoisonError::into_inner) = renewed;
            self.refused.store(false, Ordering::Relaxed);
        }
    }
}

async fn load(config: &EventBridgeConfig) -> SdkConfig {
    // A fixed version, so that an update of the SDK does not change the defaults.
    let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12()).http_client(http_client());
    if let Some(region) = &config.region {
        loader = loader.region(Region::new(region.clone()));
    }
    loader.load().await
}

fn client(sdk: &SdkConfig, config: &EventBridgeConfig) -> Client {
    let mut builder = aws_sdk_eventbridge::config::Builder::from(sdk)
        // The engine retries. The SDK's own retries would multiply the attempts and repeat requests with an unknown outcome.
        .retry_config(RetryConfig::disabled())
        // The sink bounds each whole call, by its timeout and the deadline.
        .timeout_config(TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).build())
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
    if sdk.http_client().is_none() {
        builder = builder.http_client(http_client());
    }
    if let Some(region) = &config.region {
        builder = builder.region(Region::new(region.clone()));
    }
    // Unit files write `AWS_ENDPOINT_URL=` for "none". With an empty URL the SDK's requests panic.
    let empty = || ENDPOINT_VARIABLES.iter().find_map(|name| env::var(name).ok()).is_some_and(|url| url.is_empty());
    if config.endpoint_url.is_some() || empty() {
        builder.set_endpoint_url(config.endpoint_url.clone().filter(|url| !url.is_empty()));
    }
    Client::from_conf(builder.build())
}

/// Returns an HTTP client for EventBridge and for the credential providers. It uses rustls with ring, and also takes plain
/// `http://`.
fn http_client() -> SharedHttpClient {
    aws_smithy_http_client::Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .pool_idle_timeout(IDLE_CONNECTION)
        .build_https()
}

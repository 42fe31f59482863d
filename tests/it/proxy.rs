//! A TCP proxy with faults, between a relay and its database or destination.
//!
//! It runs in a thread of its own until it is dropped. Its faults can be changed while connections are open.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const NONE: i64 = i64::MAX;

/// Forwards connections, with faults that tests switch on and off.
pub(crate) struct Proxy {
    port: u16,
    faults: Arc<Faults>,
    /// A change of the value cuts every connection. Dropping the sender ends the proxy.
    cut: watch::Sender<u64>,
}

#[derive(Default)]
struct Faults {
    refuse: AtomicBool,
    stall: AtomicBool,
    delay_ms: AtomicU64,
    /// Bytes a second, each way; 0: no limit.
    rate: AtomicU64,
    /// How many more bytes of answers go through, counted over all connections.
    bytes_left: AtomicI64,
    /// How many more replies of Redis go through, counted over all connections.
    replies_left: AtomicI64,
    /// How many more answers are dropped, each together with its connection.
    drop_answers: AtomicI64,
    /// Only answers to requests that contain this are dropped; empty: to all requests.
    drop_after: std::sync::Mutex<Vec<u8>>,
    fired: AtomicU64,
    held: AtomicU64,
}

impl Proxy {
    /// Forwards to this port of 127.0.0.1.
    pub(crate) fn to(target: u16) -> Self {
        let faults = Arc::new(Faults::default());
        faults.bytes_left.store(NONE, Ordering::SeqCst);
        faults.replies_left.store(NONE, Ordering::SeqCst);
        let (cut, cuts) = watch::channel(0);
        let (sender, receiver) = mpsc::channel();
        let shared = Arc::clone(&faults);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
                sender.send(listener.local_addr().unwrap().port()).unwrap();
                let mut ended = cuts.clone();
                loop {
                    let accepted = tokio::select! {
                        accepted = listener.accept() => accepted,
                        () = async { while ended.changed().await.is_ok() {} } => return,
                    };
                    if let Ok((client, _)) = accepted {
                        tokio::spawn(connection(client, target, Arc::clone(&shared), cuts.clone()));
                    }
                }
            });
        });
        Self { port: receiver.recv().unwrap(), faults, cut }
    }

    /// Returns the URL with which clients reach the server through the proxy.
    pub(crate) fn url(&self, direct: &str, port: u16) -> String {
        let through = direct.replacen(&format!(":{port}"), &format!(":{}", self.port), 1);
        assert_ne!(direct, through, "port {port} is in the URL");
        through
    }

    /// Closes every connection.
    pub(crate) fn cut(&self) {
        self.fired();
        self.cut.send_modify(|cuts| *cuts += 1);
    }

    /// Whether new connections are closed at once. Open connections are left alone.
    pub(crate) fn refuse(&self, refuse: bool) {
        self.faults.refuse.store(refuse, Ordering::SeqCst);
    }

    /// Whether nothing goes through while connections stay open, as with a host that vanished or a stalled network. What was
    /// held goes on when the stall ends.
    pub(crate) fn stall(&self, stall: bool) {
        self.faults.stall.store(stall, Ordering::SeqCst);
    }

    /// Delays each chunk by this much.
    pub(crate) fn delay(&self, delay: Duration) {
        self.faults.delay_ms.store(u64::try_from(delay.as_millis()).unwrap(), Ordering::SeqCst);
    }

    /// Lets this many bytes a second through each way; 0: no limit.
    pub(crate) fn slow_to(&self, bytes_a_second: u64) {
        self.faults.rate.store(bytes_a_second, Ordering::SeqCst);
    }

    /// Cuts the connection after this many more bytes of answers, even in the middle of an answer.
    pub(crate) fn cut_after_bytes(&self, bytes: i64) {
        self.faults.bytes_left.store(bytes, Ordering::SeqCst);
    }

    /// Cuts the connection after this many more replies of Redis.
    pub(crate) fn cut_after_replies(&self, replies: i64) {
        self.faults.replies_left.store(replies, Ordering::SeqCst);
    }

    /// Drops the next so many answers to requests that contain `to`, and cuts their connections. The server has handled the
    /// request, but the client does not know.
    pub(crate) fn drop_answers(&self, count: i64, to: &str) {
        *self.faults.drop_after.lock().unwrap() = to.as_bytes().to_vec();
        self.faults.drop_answers.store(count, Ordering::SeqCst);
    }

    /// Switches off all faults.
    pub(crate) fn heal(&self) {
        self.refuse(false);
        self.stall(false);
        self.delay(Duration::ZERO);
        self.slow_to(0);
        self.cut_after_bytes(NONE);
        self.cut_after_replies(NONE);
        self.drop_answers(0, "");
    }

    /// How often the proxy refused a connection, cut one, or dropped an answer.
    pub(crate) fn count(&self) -> u64 {
        self.faults.fired.load(Ordering::SeqCst)
    }

    /// How many chunks a stall has held, or holds.
    pub(crate) fn held(&self) -> u64 {
        self.faults.held.load(Ordering::SeqCst)
    }

    fn fired(&self) {
        self.faults.fired.fetch_add(1, Ordering::SeqCst);
    }
}

impl Faults {
    fn fire(&self) {
        self.fired.fetch_add(1, Ordering::SeqCst);
    }

    /// Waits for the delay and the rate that apply to `bytes`, and as long as a stall lasts.
    async fn hold(&self, bytes: usize) {
        let delay = self.delay_ms.load(Ordering::SeqCst);
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        let rate = self.rate.load(Ordering::SeqCst);
        if rate > 0 {
            tokio::time::sleep(Duration::from_secs(1).mul_f64(bytes as f64 / rate as f64)).await;
        }
        if self.stall.load(Ordering::SeqCst) {
            self.held.fetch_add(1, Ordering::SeqCst);
        }
        self.stalled().await;
    }

    async fn stalled(&self) {
        while self.stall.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn connection(client: TcpStream, target: u16, faults: Arc<Faults>, mut cuts: watch::Receiver<u64>) {
    if faults.refuse.load(Ordering::SeqCst) {
        return faults.fire();
    }
    let Ok(server) = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, target))).await else {
        return faults.stalled().await;
    };
    client.set_nodelay(true).ok();
    server.set_nodelay(true).ok();
    cuts.mark_unchanged();
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let marked = AtomicBool::new(false);
    let requests = requests(from_client, to_server, &faults, &marked);
    let answers = answers(from_server, to_client, &faults, &marked);
    tokio::pin!(requests, answers);
    // When one direction ends or is cut, both end. While the network is stalled, no end is passed on.
    let ended = async {
        tokio::select! {
            () = &mut requests => {}
            () = &mut answers => {}
        }
        faults.stalled().await;
    };
    tokio::select! {
        () = ended => {}
        _ = cuts.changed() => {}
    }
}

async fn requests(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, faults: &Faults, marked: &AtomicBool) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        faults.hold(count).await;
        if faults.drop_answers.load(Ordering::SeqCst) > 0 {
            let mark = faults.drop_after.lock().unwrap().clone();
            let found = mark.is_empty() || buffer[..count].windows(mark.len()).any(|window| window == mark);
            marked.fetch_or(found, Ordering::SeqCst);
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

async fn answers(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, faults: &Faults, marked: &AtomicBool) {
    let mut buffer = vec![0; 16 << 10];
    let mut reply = Vec::new();
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        faults.hold(count).await;
        let answer = &buffer[..count];
        if faults.drop_answers.load(Ordering::SeqCst) > 0 && marked.swap(false, Ordering::SeqCst) {
            faults.drop_answers.fetch_sub(1, Ordering::SeqCst);
            return faults.fire();
        }
        let length = i64::try_from(count).unwrap();
        let mut allowed = count;
        if faults.bytes_left.load(Ordering::SeqCst) != NONE {
            let left = faults.bytes_left.fetch_sub(length, Ordering::SeqCst);
            allowed = allowed.min(usize::try_from(left.max(0)).unwrap());
        }
        if faults.replies_left.load(Ordering::SeqCst) != NONE {
            reply.extend_from_slice(answer);
            while let Some(end) = resp_end(&reply, 0) {
                if faults.replies_left.fetch_sub(1, Ordering::SeqCst) <= 0 {
                    // The client does not get this reply, nor what follows it.
                    allowed = allowed.min(count.saturating_sub(reply.len()));
                    break;
                }
                reply.drain(..end);
            }
        }
        if to.write_all(&answer[..allowed]).await.is_err() {
            return;
        }
        if allowed < count {
            faults.bytes_left.store(NONE, Ordering::SeqCst);
            faults.replies_left.store(NONE, Ordering::SeqCst);
            return faults.fire();
        }
    }
}

/// The offset after the reply of Redis that begins at `start`; `None` if it is incomplete.
fn resp_end(bytes: &[u8], start: usize) -> Option<usize> {
    let line = bytes.get(start..)?.windows(2).position(|window| window == b"\r\n")?;
    let end = start + line + 2;
    let number = || std::str::from_utf8(&bytes[start + 1..start + line]).ok()?.parse::<i64>().ok();
    match bytes[start] {
        b'$' => match usize::try_from(number()?) {
            Ok(length) => (bytes.len() >= end + length + 2).then_some(end + length + 2),
            Err(_) => Some(end),
        },
        b'*' => (0..number()?.max(0)).try_fold(end, |at, _| resp_end(bytes, at)),
        _ => Some(end),
    }
}

mod tests {
    use super::*;
    use crate::servers::redis;

    fn connect(proxy: &Proxy) -> redis::RedisResult<redis::Connection> {
        let url = proxy.url(redis().url(), redis().port());
        redis::Client::open(url).unwrap().get_connection_with_timeout(Duration::from_secs(2))
    }

    fn get(connection: &mut redis::Connection) -> redis::RedisResult<i64> {
        redis::cmd("GET").arg("proxy:n").query(connection)
    }

    #[test]
    fn each_fault_does_what_it_says() {
        let proxy = Proxy::to(redis().port());
        let mut connection = connect(&proxy).unwrap();
        redis::cmd("SET").arg("proxy:n").arg(1).exec(&mut connection).unwrap();
        assert_eq!(get(&mut connection).unwrap(), 1);

        proxy.cut();
        get(&mut connection).unwrap_err();
        proxy.refuse(true);
        assert!(connect(&proxy).is_err());
        proxy.heal();

        // The server gets the request; the client does not get the answer.
        let mut connection = connect(&proxy).unwrap();
        proxy.drop_answers(1, "INCR");
        assert_eq!(get(&mut connection).unwrap(), 1);
        redis::cmd("INCR").arg("proxy:n").exec(&mut connection).unwrap_err();
        let mut connection = connect(&proxy).unwrap();
        assert_eq!(get(&mut connection).unwrap(), 2);

        // Of three replies in one pipeline, two go through.
        proxy.cut_after_replies(2);
        assert_eq!(get(&mut connection).unwrap(), 2);
        let all: redis::RedisResult<(i64, i64)> = redis::pipe().get("proxy:n").get("proxy:n").query(&mut connection);
        all.unwrap_err();
        proxy.heal();
        let mut connection = connect(&proxy).unwrap();
        proxy.cut_after_bytes(2);
        get(&mut connection).unwrap_err();
        proxy.heal();

        let mut connection = connect(&proxy).unwrap();
        connection.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        proxy.stall(true);
        get(&mut connection).unwrap_err();
        proxy.heal();
        assert!(proxy.count() >= 5, "{}", proxy.count());
    }

    #[test]
    fn a_slow_proxy_takes_its_time() {
        let proxy = Proxy::to(redis().port());
        let mut connection = connect(&proxy).unwrap();
        proxy.slow_to(1000);
        let begun = std::time::Instant::now();
        redis::cmd("ECHO").arg("x".repeat(200)).exec(&mut connection).unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
        proxy.slow_to(0);
        proxy.delay(Duration::from_millis(50));
        let begun = std::time::Instant::now();
        get(&mut connection).ok();
        assert!(begun.elapsed() >= Duration::from_millis(100), "{:?}", begun.elapsed());
    }
}

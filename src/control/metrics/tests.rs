//! The thread, over loopback: scrapes, and clients that mean no good.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// A page that counts how often it was made.
fn started(page: &'static str) -> (Metrics, Arc<AtomicUsize>) {
    let made = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&made);
    let ask = move || {
        count.fetch_add(1, Ordering::Relaxed);
        Some(page.repeat(1000))
    };
    let metrics =
        Metrics::with("127.0.0.1:0".parse().expect("an address"), Box::new(ask)).expect("a free port");
    (metrics, made)
}

fn connect(metrics: &Metrics) -> TcpStream {
    let stream = TcpStream::connect(metrics.address()).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    stream
}

fn asked(mut stream: TcpStream, request: &[u8]) -> String {
    stream.write_all(request).expect("it reads");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("it answers and closes");
    text
}

const SCRAPE: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n";

#[test]
fn a_scrape_gets_the_whole_page_and_soon_after_the_same_one() {
    let (metrics, made) = started("fastice_page 1\n");
    for _ in 0..5 {
        let text = asked(connect(&metrics), SCRAPE);
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains("Content-Length: 15000\r\n") && body.len() == 15_000, "{head}");
    }
    assert!(made.load(Ordering::Relaxed) >= 1);
    assert!(asked(connect(&metrics), b"GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
    assert!(asked(connect(&metrics), b"PUT /metrics HTTP/1.1\r\n\r\n").contains("\r\nAllow: GET\r\n"));
}

#[test]
fn a_request_that_comes_in_pieces_is_a_request() {
    let (metrics, _) = started("x\n");
    let mut stream = connect(&metrics);
    for byte in &SCRAPE[..SCRAPE.len() - 1] {
        stream.write_all(&[*byte]).expect("it reads");
    }
    assert!(asked(stream, b"\n").starts_with("HTTP/1.1 200 OK"));
}

#[test]
fn those_who_say_nothing_or_too_much_starve_nobody() {
    let (metrics, made) = started("x\n");
    // More than may be connected, all silent: the oldest go.
    let silent: Vec<_> = (0..CLIENTS_MAX * 4).map(|_| connect(&metrics)).collect();
    let mut endless = connect(&metrics);
    let sent = endless.write_all(&[b'a'; REQUEST_LEN_MAX]);
    let mut said = String::new();
    // It may have been thrown out before it could say so much.
    if sent.is_ok() && endless.read_to_string(&mut said).is_ok() {
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 431 "), "{said}");
    }
    assert!(asked(connect(&metrics), SCRAPE).starts_with("HTTP/1.1 200 OK"));
    let begun = Instant::now();
    // And whoever asks again and again makes nobody count again and again.
    let before = made.load(Ordering::Relaxed);
    let mut asked_for = 0;
    while begun.elapsed() < PAGE_AGE_MAX * 2 {
        assert!(asked(connect(&metrics), SCRAPE).starts_with("HTTP/1.1 200 OK"));
        asked_for += 1;
    }
    let pages = made.load(Ordering::Relaxed) - before;
    let most = usize::try_from(begun.elapsed().as_millis() / PAGE_AGE_MAX.as_millis()).expect("small") + 1;
    assert!(pages <= most, "{pages} pages for {asked_for} scrapes in {:?}", begun.elapsed());
    drop(silent);
}

#[test]
fn a_silent_client_is_let_go_after_its_time() {
    let (metrics, _) = started("x\n");
    let mut stream = connect(&metrics);
    let begun = Instant::now();
    let mut bytes = [0];
    assert_eq!(stream.read(&mut bytes).expect("an orderly end"), 0);
    assert!(begun.elapsed() >= CLIENT_PATIENCE - Duration::from_millis(100));
}

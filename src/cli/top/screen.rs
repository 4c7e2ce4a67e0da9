//! The live view: a terminal, its keys, and a thread that asks.
//!
//! ```text
//!   asker thread   waits to be told --> Sample::take --> channel, and a byte in a pipe that the loop waits for
//!   loop           keys, signals, the asker's byte, the time for the next look --> one picture
//! ```
//!
//! A target that takes its time with an answer holds up no key. The terminal is given back whichever way this ends: by a key, an
//! error, a signal that can be caught, or a panic.

use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use rustix::process::getpgrp;
use rustix::termios::tcgetpgrp;

use super::view::{Sample, View};
use super::{Sort, draw, nobody};
use crate::cli::sys::{StopSignals, Wake};

/// So often the terminal may say that there is input, and have none, before it is taken for gone.
const EMPTY_MAX: u32 = 1000;

/// The terminal, until it is dropped.
struct Screen(DefaultTerminal);

impl Screen {
    fn open() -> io::Result<Self> {
        ratatui::try_init().map(Self).inspect_err(|_| give_back())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

fn give_back() {
    // A terminal that is gone has nothing to be given back.
    let _ = ratatui::try_restore();
}

/// What is shown, and how.
struct Top {
    state: PathBuf,
    interval: Duration,
    sort: Sort,
    paused: bool,
    last: Option<Sample>,
    view: Option<View>,
    /// Whether the asker asks.
    asked: bool,
    next: Instant,
}

/// What a key wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Quit,
    Sort,
    Pause,
}

fn wish(key: &KeyEvent) -> Option<Wish> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    // With Ctrl no other: an end of input from before the terminal was ours (`script` without input sends one) arrives as Ctrl-Space.
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        return matches!(key.code, KeyCode::Char('c' | 'd')).then_some(Wish::Quit);
    }
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => Some(Wish::Quit),
        KeyCode::Char('s') => Some(Wish::Sort),
        KeyCode::Char('p' | ' ') => Some(Wish::Pause),
        _ => None,
    }
}

impl Top {
    fn new(state: &Path, interval: Duration, sort: Sort) -> Self {
        let (state, next) = (state.to_owned(), Instant::now());
        Self { state, interval, sort, paused: false, last: None, view: None, asked: false, next }
    }

    /// Does what a key wants; false to end.
    fn heed(&mut self, wish: Wish) -> bool {
        match wish {
            Wish::Quit => return false,
            Wish::Sort => {
                self.sort = self.sort.next();
                if let Some(view) = &mut self.view {
                    view.sort(self.sort);
                }
            }
            Wish::Pause => self.paused = !self.paused,
        }
        true
    }

    /// The answers of all targets.
    fn answered(&mut self, sample: Sample) {
        self.asked = false;
        // What was asked for before the pause does not change the picture.
        if !self.paused {
            let mut view = View::between(self.last.as_ref().unwrap_or(&sample), &sample);
            view.sort(self.sort);
            self.view = Some(view);
            self.last = Some(sample);
        }
    }

    /// Whether it is time to ask; it is taken for done then.
    fn is_due(&mut self, now: Instant) -> bool {
        let is_due = !self.paused && !self.asked && now >= self.next;
        if is_due {
            self.asked = true;
            self.next = now + self.interval;
        }
        is_due
    }

    /// How long there is nothing to do by itself.
    fn timeout(&self, now: Instant) -> Option<Duration> {
        (!self.paused && !self.asked).then(|| self.next.saturating_duration_since(now))
    }

    fn foot(&self) -> String {
        let paused = if self.paused { "PAUSED  " } else { "" };
        format!(
            "{paused}q quit  s sort: {}  p pause  every {:.1} s",
            self.sort.word(),
            self.interval.as_secs_f64()
        )
    }

    fn draw(&self, screen: &mut Screen) -> io::Result<()> {
        let foot = self.foot();
        let empty = || View { heads: vec![nobody(&self.state)], ..View::default() };
        let view = match &self.view {
            Some(view) if !view.is_empty() => view.clone(),
            Some(_) => empty(),
            None => View { heads: vec!["asking ...".to_owned()], ..View::default() },
        };
        screen.0.draw(|frame| draw::draw(&view, Some(&foot), frame.area(), frame.buffer_mut()))?;
        Ok(())
    }
}

/// The thread that asks, and what it tells.
struct Asker {
    ask: Sender<()>,
    answers: Receiver<Sample>,
    told: UnixStream,
}

impl Asker {
    /// It ends with the process, or when nobody wants to know any more.
    fn start(state: PathBuf) -> io::Result<Self> {
        let (ask, asked) = channel::<()>();
        let (answer, answers) = channel();
        let (told, mut tell) = UnixStream::pair()?;
        told.set_nonblocking(true)?;
        std::thread::Builder::new().name("asker".to_owned()).spawn(move || {
            for () in asked {
                let (sample, _) = Sample::take(&state);
                if answer.send(sample).is_err() || tell.write_all(&[0]).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { ask, answers, told })
    }

    fn answer(&self) -> Option<Sample> {
        let mut byte = [0];
        // Nothing to read is fine: the channel says what there is.
        let _ = io::Read::read(&mut &self.told, &mut byte);
        self.answers.try_recv().ok()
    }
}

/// Shows the live view until somebody wants it to end.
///
/// # Errors
/// When the terminal fails.
pub(super) fn run(state: &Path, interval: Duration, sort: Sort) -> io::Result<()> {
    // Who changes the terminal from behind is stopped, and with its signals blocked, as below, not to be ended but by SIGKILL.
    if tcgetpgrp(io::stdin()).is_ok_and(|in_front| in_front != getpgrp()) {
        return Err(io::Error::other(
            "it runs in the background of its terminal, where it may not draw: bring it to the front (of timeout(1): --foreground), or \
             ask once: fastice top --once",
        ));
    }
    // Before the asker, which inherits the mask.
    let signals = StopSignals::take()?;
    let asker = Asker::start(state.to_owned())?;
    let mut top = Top::new(state, interval, sort);
    let mut screen = Screen::open()?;
    let stdin = io::stdin();
    let mut empty = 0;
    loop {
        if top.is_due(Instant::now()) && asker.ask.send(()).is_err() {
            return Err(io::Error::other("the thread that asks the targets has ended"));
        }
        top.draw(&mut screen)?;
        match signals.wait(&[stdin.as_fd(), asker.told.as_fd()], top.timeout(Instant::now()))? {
            Wake::Asked(_) => return Ok(()),
            Wake::Timeout => {}
            Wake::Readable(0) => {
                let mut keys = 0;
                while event::poll(Duration::ZERO)? {
                    keys += 1;
                    if let Event::Key(key) = event::read()?
                        && wish(&key).is_some_and(|wish| !top.heed(wish))
                    {
                        return Ok(());
                    }
                }
                empty = if keys > 0 { 0 } else { empty + 1 };
                if empty > EMPTY_MAX {
                    return Err(io::Error::other("the terminal is gone"));
                }
            }
            Wake::Readable(_) => {
                if let Some(sample) = asker.answer() {
                    top.answered(sample);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::fs::File;
    use std::io::Read as _;
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    use rustix::process::{ioctl_tiocsctty, setsid};
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::{Winsize, tcsetwinsize};

    use super::super::view::tests::samples;
    use super::*;

    fn key(code: KeyCode) -> KeyEvent {
        KeyEvent::new(code, KeyModifiers::NONE)
    }

    #[test]
    fn keys_quit_sort_and_pause() {
        assert_eq!(wish(&key(KeyCode::Char('q'))), Some(Wish::Quit));
        assert_eq!(wish(&KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)), Some(Wish::Quit));
        assert_eq!(wish(&key(KeyCode::Char('c'))), None);
        assert_eq!(wish(&KeyEvent::new(KeyCode::Char(' '), KeyModifiers::CONTROL)), None);
        assert_eq!(wish(&key(KeyCode::Char('s'))), Some(Wish::Sort));
        assert_eq!(wish(&key(KeyCode::Char('p'))), Some(Wish::Pause));
        let mut top = Top::new(Path::new("/"), Duration::from_secs(1), Sort::Rate);
        assert!(top.heed(Wish::Sort) && top.heed(Wish::Pause) && !top.heed(Wish::Quit));
        assert!(top.foot().starts_with("PAUSED") && top.foot().contains("sort: latency"), "{}", top.foot());
    }

    #[test]
    fn it_asks_once_an_interval_and_not_while_it_is_paused_or_waits_for_an_answer() {
        let mut top = Top::new(Path::new("/"), Duration::from_secs(1), Sort::Rate);
        let (first, second) = samples();
        let now = top.next;
        assert!(top.is_due(now) && !top.is_due(now), "it was asked");
        assert_eq!(top.timeout(now), None, "the answer wakes it");
        top.answered(first);
        assert_eq!(top.timeout(now), Some(Duration::from_secs(1)));
        assert!(!top.is_due(now) && top.is_due(now + Duration::from_secs(1)));
        top.answered(second);
        assert!(top.view.as_ref().is_some_and(|view| view.rates.commands > 0), "{:?}", top.view);
        assert!(top.heed(Wish::Pause));
        assert!(!top.is_due(now + Duration::from_secs(9)));
        assert_eq!(top.timeout(now), None);
    }

    #[test]
    fn a_picture_that_is_paused_does_not_change() {
        let mut top = Top::new(Path::new("/"), Duration::from_secs(1), Sort::Rate);
        let (first, second) = samples();
        top.answered(first);
        let shown = top.view.clone();
        top.heed(Wish::Pause);
        top.answered(second);
        assert_eq!(top.view, shown);
    }

    /// What a process is to do that the test below has started of itself.
    const ROLE: &str = "FASTICE_TEST_TOP_ROLE";
    const PATIENCE: Duration = Duration::from_secs(20);

    fn myself(role: &str) -> Command {
        let (_, module) = module_path!().split_once("::").expect("a module of a crate");
        let name = format!("{module}::it_runs_in_front_of_its_terminal_and_not_behind");
        let mut command = Command::new(env::current_exe().expect("a program"));
        command.args(["--exact", &name, "--nocapture"]).env(ROLE, role);
        command
    }

    #[test]
    fn it_runs_in_front_of_its_terminal_and_not_behind() {
        let look = || run(Path::new("/nonexistent"), Duration::from_millis(100), Sort::Rate);
        match env::var(ROLE).as_deref() {
            Ok("leader") => lead_a_session(),
            Ok("in front") => look().expect("a key ends it"),
            Ok(_) => {
                let error = look().expect_err("it may not draw").to_string();
                assert!(error.contains("in the background") && error.contains("--once"), "{error}");
            }
            Err(_) => watch_a_session(),
        }
    }

    /// Starts a session on a new terminal, and types the key that ends the live view.
    fn watch_a_session() {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let keyboard = openpt(flags).expect("a terminal");
        unlockpt(&keyboard).expect("it is ours");
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&keyboard, size).expect("a terminal");
        let terminal = ioctl_tiocgptpeer(&keyboard, flags).expect("its other end");
        let stdin = terminal.try_clone().expect("a descriptor");
        let mut leader = myself("leader").stdin(stdin).stdout(terminal).spawn().expect("it runs");
        let mut keyboard = File::from(keyboard);
        let (mut seen, mut piece, mut is_typed) = (Vec::new(), [0; 4096], false);
        // It fails when nobody has the other end any more.
        while let Some(len) = keyboard.read(&mut piece).ok().filter(|len| *len > 0) {
            seen.extend_from_slice(&piece[..len]);
            if !is_typed && String::from_utf8_lossy(&seen).contains("quit") {
                keyboard.write_all(b"q").expect("it reads");
                is_typed = true;
            }
        }
        let seen = String::from_utf8_lossy(&seen);
        assert!(leader.wait().expect("it was started").success() && is_typed, "{seen}");
    }

    /// A child of this group is in front, one with a group of its own is not.
    fn lead_a_session() {
        setsid().expect("who was just started leads no group");
        ioctl_tiocsctty(io::stdin()).expect("a terminal of no other session");
        let ends_well = |mut command: Command| {
            let mut child = command.spawn().expect("it runs");
            let start = Instant::now();
            // Who tries to draw in the background is stopped, and never ends.
            while start.elapsed() < PATIENCE {
                if let Some(status) = child.try_wait().expect("a child") {
                    return status.success();
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            child.kill().and_then(|()| child.wait()).expect("a child");
            false
        };
        let mut behind = myself("behind");
        behind.process_group(0);
        assert!(ends_well(behind), "in the background");
        assert!(ends_well(myself("in front")), "in front");
    }
}

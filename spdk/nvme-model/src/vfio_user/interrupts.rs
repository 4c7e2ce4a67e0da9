//! Interrupts: the eventfds of a client, attached to the model's vectors.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use async_nvme::access::Access;
use async_nvme::vfio_user::Message;
use async_nvme::vfio_user::wire::{IrqSet, irq_set_flag, pci};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::session::{Reply, split};
use crate::Model;

const ATTACH: u32 = irq_set_flag::DATA_EVENTFD | irq_set_flag::ACTION_TRIGGER;
const MASK: u32 = irq_set_flag::DATA_NONE | irq_set_flag::ACTION_MASK;
const UNMASK: u32 = irq_set_flag::DATA_NONE | irq_set_flag::ACTION_UNMASK;
/// Of no vectors: an end to all of them.
const END: u32 = irq_set_flag::DATA_NONE | irq_set_flag::ACTION_TRIGGER;

/// What a client attached.
#[derive(Debug, Default)]
pub(crate) struct Interrupts {
    /// The eventfd of each vector, also of one that is masked.
    eventfds: BTreeMap<u16, OwnedFd>,
}

impl Interrupts {
    /// DEVICE_SET_IRQS.
    pub(crate) fn set(&mut self, model: &Model, message: Message) -> Reply {
        let (ask, _): (IrqSet, _) = split(&message.body)?;
        let (Ok(start), Ok(count)) = (u16::try_from(ask.start), u16::try_from(ask.count)) else {
            return Err(Errno::INVAL);
        };
        let end = start.checked_add(count).filter(|&end| end <= model.interrupts_max());
        let (Some(end), pci::IRQ_MSIX) = (end, ask.index) else { return Err(Errno::INVAL) };
        match ask.flags {
            ATTACH if message.fds.len() == usize::from(count) => {
                for (vector, fd) in (start..end).zip(message.fds) {
                    make_harmless(&fd)?;
                    attach(model, vector, fd.as_fd())?;
                    self.eventfds.insert(vector, fd);
                }
            }
            MASK => (start..end).for_each(|vector| detach(model, vector)),
            UNMASK => {
                for (&vector, fd) in self.eventfds.range(start..end) {
                    attach(model, vector, fd.as_fd())?;
                }
            }
            END if count == 0 => self.end(model),
            _ => return Err(Errno::INVAL),
        }
        Ok(Vec::new())
    }

    /// Signals nothing any more.
    pub(crate) fn end(&mut self, model: &Model) {
        for vector in std::mem::take(&mut self.eventfds).into_keys() {
            detach(model, vector);
        }
    }
}

fn attach(model: &Model, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), Errno> {
    model.interrupt_attach(vector, eventfd).map_err(|_| Errno::IO)
}

fn detach(model: &Model, vector: u16) {
    // It fails only for vectors that are not there, which nobody hears either.
    let _ = model.interrupt_detach(vector);
}

/// Has writing to a client's eventfd not block, and refuses what is none.
fn make_harmless(fd: &OwnedFd) -> Result<(), Errno> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(|_| Errno::INVAL)?;
    if link.as_os_str() != "anon_inode:[eventfd]" {
        return Err(Errno::INVAL);
    }
    let flags = rustix::fs::fcntl_getfl(fd)?;
    rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use async_nvme::vfio_user::Stream;
    use async_nvme::vfio_user::wire::{Command, Header, Version, flag};
    use rustix::event::{EventfdFlags, eventfd};
    use zerocopy::IntoBytes;

    use crate::vfio_user::ServerOptions;
    use crate::vfio_user::session::Session;
    use crate::{ControllerOptions, Subsystem};

    /// Both ends, turned by hand.
    struct Rig {
        session: Session,
        client: Stream,
    }

    impl Rig {
        fn new() -> Self {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let model = Subsystem::new("IRQ").controller(ControllerOptions::default());
            let session = Session::new(model, theirs, ServerOptions::default()).unwrap();
            let mut rig = Self { session, client: Stream::new(ours).unwrap() };
            let version = Version { major: 0, minor: 1 };
            assert_eq!(rig.call(Command::VERSION, version.as_bytes(), &[]), Ok(()));
            rig
        }

        fn call(&mut self, command: Command, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
            self.client.send(Header::command(1, command, 0), &[body], fds, Instant::now()).unwrap();
            self.session.turn().unwrap();
            let header = self.client.try_receive().unwrap().unwrap().header;
            let errno = i32::try_from(header.error).unwrap();
            if header.flags & flag::ERROR == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(errno)) }
        }

        fn set(&mut self, flags: u32, start: u32, count: u32, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
            let set = IrqSet { argsz: 20, flags, index: pci::IRQ_MSIX, start, count };
            self.call(Command::DEVICE_SET_IRQS, set.as_bytes(), fds)
        }

        fn raise(&self, vector: u16) {
            self.session.model.lock().interrupt(Some(vector));
        }
    }

    fn rung(eventfd: &OwnedFd) -> bool {
        rustix::io::read(eventfd, &mut [0; 8]).is_ok()
    }

    #[test]
    fn interrupts_are_attached_masked_and_ended() {
        let mut rig = Rig::new();
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        assert_eq!(rig.set(ATTACH, 1, 1, &[eventfd.as_fd()]), Ok(()));
        rig.raise(2);
        assert!(!rung(&eventfd), "another vector; and reading does not block");
        rig.raise(1);
        assert!(rung(&eventfd));
        assert_eq!(rig.set(MASK, 1, 1, &[]), Ok(()));
        rig.raise(1);
        assert!(!rung(&eventfd));
        assert_eq!(rig.set(UNMASK, 0, 3, &[]), Ok(()));
        assert!(rung(&eventfd), "what was pending");
        assert_eq!(rig.set(END, 0, 0, &[]), Ok(()));
        assert_eq!(rig.set(UNMASK, 0, 3, &[]), Ok(()));
        rig.raise(1);
        assert!(!rung(&eventfd));
    }

    #[test]
    fn what_is_no_eventfd_or_no_vector_is_refused() {
        let mut rig = Rig::new();
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (_reader, pipe) = rustix::pipe::pipe().unwrap();
        let count = u32::from(rig.session.model.interrupts_max());
        assert_eq!(rig.set(ATTACH, 1, 1, &[pipe.as_fd()]), Err(Errno::INVAL), "it could block the server");
        assert_eq!(rig.set(ATTACH, 1, 1, &[]), Err(Errno::INVAL));
        assert_eq!(rig.set(ATTACH, 1, 1, &[eventfd.as_fd(), eventfd.as_fd()]), Err(Errno::INVAL));
        assert_eq!(rig.set(ATTACH, count, 1, &[eventfd.as_fd()]), Err(Errno::INVAL));
        assert_eq!(rig.set(MASK, 0, u32::MAX, &[]), Err(Errno::INVAL));
        assert_eq!(rig.set(MASK, u32::MAX, 1, &[]), Err(Errno::INVAL));
        let booleans = irq_set_flag::DATA_BOOL | irq_set_flag::ACTION_TRIGGER;
        assert_eq!(rig.set(booleans, 0, 1, &[]), Err(Errno::INVAL));
        let msi = IrqSet { argsz: 20, flags: MASK, index: pci::IRQ_MSI, start: 0, count: 1 };
        assert_eq!(rig.call(Command::DEVICE_SET_IRQS, msi.as_bytes(), &[]), Err(Errno::INVAL));
    }
}

package fusefs

import "syscall"

// failures is told of each request that is answered with an errno which says that something went wrong: see
// backend.Options. It may be nil.
type failures func(syscall.Errno)

func (f failures) note(errno syscall.Errno) {
	if f != nil {
		f(errno)
	}
}

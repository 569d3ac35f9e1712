// Command erofs-oci mounts EROFS images straight out of OCI registries and
// fetches only what is read. See README.md.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/backend"
)

// Exit codes: what was asked for cannot be done, what was asked makes no sense, and
// what was read turned out to be wrong.
const (
	exitFailure = 1
	exitUsage   = 2
	exitWrong   = 3
)

func main() {
	if calledAsHelper(os.Args) {
		os.Exit(runHelper(os.Args, os.Stdin, os.Stdout, os.Stderr))
	}
	if calledAsPeer(os.Args) {
		os.Exit(runPeer(os.Args, os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(run(os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// run is the whole program but for the process: it returns the exit code.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), endSignals()...)
	defer stop()
	// A second signal ends whatever does not heed the first.
	defer context.AfterFunc(ctx, stop)()
	child, err := backend.AsChild(stop)
	if err != nil {
		fmt.Fprintln(stderr, "erofs-oci:", err)
		return exitFailure
	}
	p := &program{stdin: stdin, stdout: stdout, stderr: stderr, getenv: os.Getenv, child: child}
	defer p.closeLog()
	err = p.app().RunContext(ctx, args)
	if err == nil {
		return 0
	}
	code := exitCode(err)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	if errors.As(err, new(errSilent)) {
		return code
	}
	if child != nil && !p.reported {
		// The one who started us prints the line.
		if child.Fail(errors.New(oneLine(err)), code) == nil {
			return code
		}
	}
	if p.reported {
		p.sayEnded(err)
		return code
	}
	fmt.Fprintln(stderr, "erofs-oci:", oneLine(err))
	return code
}

// endSignals are what a user ends a command with; SIGHUP is a closed terminal.
func endSignals() []os.Signal { return []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} }

// oneLine is the text of an error on one line; several that were joined stand on
// a line each.
func oneLine(err error) string {
	return strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
}

// program is what the commands share.
type program struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
	// child is set in the process that serves a mount in the background;
	// reported says that it has told its parent how it went.
	child    *backend.Child
	reported bool
	log      *serverLog // of this process, if it has one
}

func (p *program) app() *cli.App {
	app := &cli.App{
		Name:                      "erofs-oci",
		Usage:                     "mount EROFS images out of OCI registries, fetching only what is read",
		Version:                   version(),
		HideHelpCommand:           true,
		UseShortOptionHandling:    false,
		DisableSliceFlagSeparator: true,
		Reader:                    p.stdin,
		Writer:                    p.stdout,
		ErrWriter:                 p.stderr,
		Commands: []*cli.Command{p.mountCommand(), p.fuseCommand(), p.umountCommand(), p.listCommand(), p.metricsCommand(), p.inspectCommand(),
			p.buildCommand(), p.convertCommand(), p.pushCommand(), p.diffCommand(),
			p.lsCommand(), p.catCommand(), p.statCommand(), p.extractCommand(),
			p.checkCommand(), p.dumpCommand(), p.serveCommand(), p.reattachCommand(), p.disconnectCommand(), p.cacheCommand(), p.profileCommand(), p.doctorCommand(), p.helperCommand()},
		// run prints errors and chooses the exit code.
		ExitErrHandler: func(*cli.Context, error) {},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("unknown command %q; see erofs-oci --help", c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
	}
	app.OnUsageError = usageError
	for _, c := range app.Commands {
		c.OnUsageError = usageError
	}
	return app
}

// errUsage marks errors of the command line.
type errUsage struct{ error }

func (e errUsage) Unwrap() error { return e.error }

// errTrouble marks what kept diff from telling whether two trees differ: it ends as diff(1) and cmp(1) do.
type errTrouble struct{ error }

func (e errTrouble) Unwrap() error { return e.error }

// errSilent marks an error of which the exit code says enough.
type errSilent struct{ error }

func (e errSilent) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return errUsage{fmt.Errorf(format, args...)} }

func usageError(c *cli.Context, err error, _ bool) error {
	return usagef("%w; see %s --help", err, cmp.Or(c.Command.HelpName, c.App.Name))
}

func exitCode(err error) int {
	var usage errUsage
	if errors.As(err, &usage) || errors.As(err, new(errTrouble)) {
		return exitUsage
	}
	var wrong *wrongError
	if errors.As(err, &wrong) {
		return exitWrong
	}
	var child *backend.ChildError
	if errors.As(err, &child) && child.Code != 0 {
		return child.Code
	}
	return exitFailure
}

// version is the module's version, and the commit where the build knows it.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	if v == "" {
		v = "(devel)"
	}
	var revision, dirty string
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			revision = s.Value
		case "vcs.modified":
			if s.Value == "true" {
				dirty = "+dirty"
			}
		}
	}
	if len(revision) >= 12 && !strings.Contains(v, revision[:12]) {
		v += " (" + revision[:12] + dirty + ")"
	}
	return v + " " + info.GoVersion
}

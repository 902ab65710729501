package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/jobs"
	"github.com/memlinux/memlinux/imagegen"
	"github.com/memlinux/memlinux/imagegen/cache"
	"github.com/memlinux/memlinux/media"
	"github.com/memlinux/memlinux/media/blockdev"
	"github.com/memlinux/memlinux/testvm"
)

// The phases of jobs. The weights are their shares of the time on a stick that
// takes 30 MB/s and a machine without KVM.
const (
	phaseImage    = "image"
	phaseWrite    = media.PhaseWrite
	phaseReadBack = media.PhaseReadBack
	phaseCheck    = "check"
	phaseData     = "data disc"
	phaseRun      = "run"
)

func bootPhase(fw testvm.Firmware) string { return "boot " + strings.ToUpper(string(fw)) }

var (
	firmwares = []testvm.Firmware{testvm.BIOS, testvm.UEFI}

	writePhases = []jobs.Phase{{Name: phaseImage, Weight: 1}, {Name: phaseWrite, Weight: 4}, {Name: phaseReadBack, Weight: 3}}
	bootPhases  = []jobs.Phase{{Name: bootPhase(testvm.BIOS), Weight: 8}, {Name: bootPhase(testvm.UEFI), Weight: 12}}
)

// buildPhases are those of generating the system of a recipe.
func buildPhases(r imagegen.Recipe) []jobs.Phase {
	phases := []jobs.Phase{{Name: imagegen.PhaseKernel, Weight: 2}}
	if r.Kernel.FromSource() {
		phases = append(phases, jobs.Phase{Name: imagegen.PhaseUnpack, Weight: 20}, jobs.Phase{Name: imagegen.PhaseCompile, Weight: 550, Unit: api.UnitObjects})
	}
	phases = append(phases, jobs.Phase{Name: imagegen.PhaseBusybox, Weight: 0.5})
	if r.Busybox.FromSource() {
		phases = append(phases, jobs.Phase{Name: imagegen.PhaseMake, Weight: 60, Unit: api.UnitObjects})
	}
	return append(phases, jobs.Phase{Name: imagegen.PhaseInitramfs, Weight: 1})
}

// stateDir is a folder below the daemon's state.
func (s *Server) stateDir(parts ...string) string {
	return filepath.Join(append([]string{s.config().StateDir}, parts...)...)
}

func (s *Server) listJobs(c *call) ([]any, error) {
	if err := c.options().end(); err != nil {
		return nil, err
	}
	paths := []dbus.ObjectPath{}
	for _, j := range s.jobs.Jobs() {
		paths = append(paths, api.JobPath(j.ID))
	}
	slices.Sort(paths)
	return []any{paths}, nil
}

// cancelJob returns when nothing of the job runs any more.
func (s *Server) cancelJob(c *call) ([]any, error) {
	if err := c.options().end(); err != nil {
		return nil, err
	}
	id, _ := api.JobID(c.path)
	j, ok := s.jobs.Job(id)
	if !ok {
		return nil, &api.Error{Name: api.ErrNoSuchJob, Message: "no job " + id + "; list them with memlinux jobs"}
	}
	return nil, j.Cancel(c.ctx)
}

// userTime is how long a job may take whose owner is not root. A test has less
// patience.
var userTime = 24 * time.Hour

// start begins a job that owns the files: they are closed when it has ended.
func (s *Server) start(c *call, kind string, phases []jobs.Phase, files []*os.File, run jobs.Run) ([]any, error) {
	s.life.begin()
	bound := slices.ContainsFunc(files, endsWithClient)
	j, err := s.jobs.Start(kind, c.uid, phases, func(ctx context.Context, j *jobs.Job) (*api.Report, error) {
		defer closeAll(files)
		defer s.story.began(ctx, j.Snapshot(), c.target)()
		dir, err := s.makeReportDir(j.ID(), c.uid)
		if err != nil {
			return nil, err
		}
		defer os.Remove(dir) // where nothing came into it
		tooLong := limitError("it ran for more than %.0f hours, which only root's jobs may", userTime.Hours())
		if c.uid != 0 {
			var done func()
			ctx, done = context.WithTimeoutCause(ctx, userTime, tooLong)
			defer done()
		}
		report, err := run(ctx, j)
		switch {
		case err != nil && errors.Is(context.Cause(ctx), tooLong):
			err = tooLong
		case err != nil && !errors.Is(err, context.Canceled): // which the job says in its own words
			err = contractError(err)
		}
		return report, err
	})
	if err != nil {
		s.life.end()
		closeAll(files)
		return nil, err
	}
	s.dropOldReports()
	if c.ctx.Err() != nil {
		j.Stop() // nobody will ever know of it
	}
	if bound {
		s.bind(j, c.client)
	}
	return []any{api.JobPath(j.ID())}, nil
}

// withCache is run, of a job that makes a system or writes one: what it finds in
// the cache stays until it has ended, and then the cache is within its bounds.
func (s *Server) withCache(run jobs.Run) jobs.Run {
	return func(ctx context.Context, j *jobs.Job) (*api.Report, error) {
		dir := s.config().CacheDir
		// Who needs the cache will say why, where it can't be used.
		if done, err := cache.Use(dir); err == nil {
			defer func() {
				done()
				limit := int64(s.config().CacheLimit) << 20
				// One user leaves the others half of it.
				if err := cache.Trim(dir, limit, limit/2); err != nil {
					fmt.Fprintf(os.Stderr, "memlinuxd: %v\n", err)
				}
			}()
		}
		return run(ctx, j)
	}
}

// bind ends the job with the client's connection: whoever could feed it or listen
// to it is gone then, and who else holds the other end must not keep it alive.
func (s *Server) bind(j *jobs.Job, c *client) {
	leave := s.gate.stay(c)
	stop := context.AfterFunc(c.ctx, j.Stop)
	go func() {
		defer leave()
		defer stop()
		for {
			// The bus may have dropped the word that it is gone.
			ctx, cancel := context.WithTimeout(context.Background(), askAgain)
			err := j.Wait(ctx)
			cancel()
			if err == nil {
				return
			}
			var has bool
			if err := s.aside.BusObject().CallWithContext(c.ctx, busName+".NameHasOwner", 0, c.name).Store(&has); err == nil && !has {
				j.Stop()
			}
		}
	}()
}

// askAgain is how often it is asked whether a job's client is still there.
const askAgain = 30 * time.Second

// tell passes a room's progress on to the job.
func tell(j *jobs.Job) func(phase string, done, total int64) {
	return func(phase string, done, total int64) {
		j.Begin(phase)
		j.Progress(done, total)
	}
}

func (s *Server) build(c *call) ([]any, error) {
	o := c.options()
	recipe := s.recipeOf(o)
	outputs := o.fileMap(api.OptFiles, toBeWritten)
	for name := range outputs {
		if !slices.Contains(api.BuildFiles(), name) {
			o.fail("option %q has the file %q; it can have %s", api.OptFiles, name, strings.Join(api.BuildFiles(), ", "))
		}
	}
	if err := o.end(); err != nil {
		return nil, err
	}
	return s.start(c, api.KindBuild, buildPhases(recipe), o.files, s.withCache(func(ctx context.Context, j *jobs.Job) (*api.Report, error) {
		report := &api.Report{Kind: api.KindBuild}
		sys, err := s.generate(ctx, j, recipe)
		if err != nil {
			return nil, err
		}
		report.System, report.Warnings = reportSystem(sys.Manifest), sys.Warnings
		if err := deliver(ctx, sys, outputs); err != nil {
			return report, err
		}
		report.Verified = true
		return report, nil
	}))
}

// deliver writes what was built into the caller's own files.
func deliver(ctx context.Context, sys *imagegen.System, outputs map[string]*os.File) error {
	menuText, err := menu(sys, "")
	if err != nil {
		return err
	}
	manifest, err := sys.Manifest.JSON()
	if err != nil {
		return err
	}
	for name, f := range outputs {
		var from io.Reader
		switch name {
		case api.FileMenu:
			from = strings.NewReader(string(menuText))
		case api.FileManifest:
			from = strings.NewReader(string(manifest))
		default:
			path := sys.Kernel.Path
			if name == api.FileInitramfs {
				path = sys.Initramfs.Path
			}
			cached, err := os.Open(path)
			if err != nil {
				return fmt.Errorf("deliver %s: %w", name, err)
			}
			defer cached.Close()
			from = cached
		}
		if err := overwrite(ctx, f, from); err != nil {
			return fmt.Errorf("deliver %s: %w", name, err)
		}
	}
	return nil
}

// overwrite makes f hold just what from gives.
func overwrite(ctx context.Context, f *os.File, from io.Reader) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	if _, err := io.Copy(io.NewOffsetWriter(f, 0), readerFunc(func(p []byte) (int, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		return from.Read(p)
	})); err != nil {
		return err
	}
	return f.Sync()
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// wantSerial fails where a boot could not be proven: that listens on the serial
// line.
func wantSerial(o *options, r imagegen.Recipe) {
	if c := r.Settings.Consoles; c != nil && !slices.ContainsFunc(c, func(name string) bool { return name == "ttyS0" || strings.HasPrefix(name, "ttyS0,") }) {
		o.fail("the consoles are %s, and the boot test listens on ttyS0: add that, or leave the test out by --no-boot-test", strings.Join(c, " and "))
	}
}

// destination is where an image goes.
type destination struct {
	target     *api.Target
	size       int64 // bytes of the image; 0: the least that fits
	sectorSize int
	device     *blockdev.Device // nil: a file
	open       func(*media.Image) (media.Disk, error)
	reopen     func(context.Context) (*os.File, error) // for reading, after the write
}

func (s *Server) write(c *call) ([]any, error) {
	o := c.options()
	if _, ok := o.left[api.OptImage]; ok {
		return s.writeImage(c, o)
	}
	if get[bool](o, api.OptResume) {
		return s.resume(c, o)
	}
	recipe := s.recipeOf(o)
	bootTest := o.boolean(api.OptBootTest, true)
	if bootTest {
		wantSerial(o, recipe)
	}
	terms := termsOf(o)
	if err := o.end(); err != nil {
		return nil, err
	}
	dev, disk, err := s.openDevice(c, terms)
	if err != nil {
		closeAll(o.files)
		return nil, err
	}
	to := s.toDevice(dev, disk)
	ret, err := s.start(c, api.KindWrite, phasesOfWrite(recipe, bootTest), o.files, s.withCache(func(ctx context.Context, j *jobs.Job) (*api.Report, error) {
		// Held to the end, so that nothing mounts or writes the stick
		// before it is proven.
		defer disk.Close()
		return s.runWrite(ctx, j, recipe, to, bootTest)
	}))
	if err != nil {
		disk.Close()
	}
	return ret, err
}

// toDevice is the disk as a destination.
func (s *Server) toDevice(dev blockdev.Device, disk *blockdev.Disk) destination {
	return destination{
		target:     deviceTarget(dev),
		size:       dev.Size,
		sectorSize: dev.LogicalBlockSize,
		device:     &dev,
		open:       func(*media.Image) (media.Disk, error) { return disk, nil },
		reopen: func(ctx context.Context) (*os.File, error) {
			f, _, err := s.devices.system.OpenRead(ctx, dev.Name)
			return f, err
		},
	}
}

// termsOf reads what a person agreed to about a device.
func termsOf(o *options) blockdev.Terms {
	terms := blockdev.Terms{Serial: get[string](o, api.OptSerial)}
	for _, point := range get[[][]byte](o, api.OptUnmount) {
		terms.Unmount = append(terms.Unmount, string(point))
	}
	return terms
}

func (s *Server) openDevice(c *call, terms blockdev.Terms) (blockdev.Device, *blockdev.Disk, error) {
	dev, err := s.lookUp(c.ctx, c.args[0].(dbus.ObjectPath))
	if err != nil {
		return dev, nil, err
	}
	if err := c.stillOn(dev, actionWriteRemovable, actionWriteFixed); err != nil {
		return dev, nil, err
	}
	disk, err := s.devices.system.OpenOn(c.ctx, dev.Name, c.args[1].(string), terms)
	c.target = deviceTarget(dev)
	return dev, disk, err
}

func deviceTarget(d blockdev.Device) *api.Target {
	return &api.Target{Kind: "device", Name: d.Name, Model: strings.TrimSpace(d.Vendor + " " + d.Model), Serial: d.Serial, Transport: d.Transport,
		Size: d.Size, SectorSize: d.LogicalBlockSize}
}

func phasesOfWrite(r imagegen.Recipe, bootTest bool) []jobs.Phase {
	phases := slices.Concat(buildPhases(r), writePhases)
	if bootTest {
		phases = append(phases, bootPhases...)
	}
	return phases
}

func (s *Server) writeFile(c *call) ([]any, error) {
	o := c.options()
	recipe := s.recipeOf(o)
	bootTest := o.boolean(api.OptBootTest, true)
	if bootTest {
		wantSerial(o, recipe)
	}
	size := get[uint64](o, api.OptSize)
	if size > 1<<46 {
		o.fail("option %q is %d bytes; 64 TiB are the most", api.OptSize, size)
	}
	f := o.argument(toBeBoth)
	if err := o.end(); err != nil {
		return nil, err
	}
	to := destination{
		target:     &api.Target{Kind: "file", SectorSize: 512},
		size:       int64(size),
		sectorSize: 512,
		open:       func(im *media.Image) (media.Disk, error) { return media.NewFileDisk(f, im) },
		reopen:     func(context.Context) (*os.File, error) { return readOnly(f) },
	}
	return s.start(c, api.KindWrite, phasesOfWrite(recipe, bootTest), o.files, s.withCache(func(ctx context.Context, j *jobs.Job) (*api.Report, error) {
		return s.runWrite(ctx, j, recipe, to, bootTest)
	}))
}

// readOnly opens the file behind f, which is open for reading, once more: for
// reading only, and without waiting for who holds a lease on it.
func readOnly(f *os.File) (*os.File, error) {
	r, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("reopen for reading: %w", err)
	}
	return r, nil
}

// runWrite is the main job: generate, compose, write, read back, boot.
func (s *Server) runWrite(ctx context.Context, j *jobs.Job, recipe imagegen.Recipe, to destination, bootTest bool) (*api.Report, error) {
	report := &api.Report{Kind: api.KindWrite, Target: to.target}
	sys, err := s.generate(ctx, j, recipe)
	if err != nil {
		return report, err
	}
	j.Begin(phaseImage)
	st, err := newStamp(recipe.Epoch)
	if err != nil {
		return report, err
	}
	return s.put(ctx, j, report, sys, st, to, bootTest, nil)
}

// put composes the system as an image with that stamp, writes it, reads it back
// and boots it. It goes on with the write that before tells of, if that is not
// nil.
func (s *Server) put(ctx context.Context, j *jobs.Job, report *api.Report, sys *imagegen.System, st stamp, to destination, bootTest bool, before *interruption) (*api.Report, error) {
	report.System, report.Warnings = reportSystem(sys.Manifest), sys.Warnings
	composed, err := compose(ctx, s.mkimage(), sys, to.size, to.sectorSize, st)
	var small *media.NoSpaceError
	if errors.As(err, &small) && to.device == nil {
		small.Where = "the image"
		err = fmt.Errorf("%w; give a larger --size", err)
	}
	if err != nil {
		return report, err
	}
	defer composed.Close()
	report.Image = reportImage(composed.image, composed.volume)
	to.target.Size = composed.image.Size
	if report.Image.SHA256Planned, err = composed.image.Digest(ctx); err != nil {
		return report, err
	}

	disk, err := to.open(composed.image)
	if err != nil {
		return report, err
	}
	record := s.beginWrite(ctx, j, report, sys, st, to, bootTest, before)
	defer s.endWrite(record)
	result, err := media.Write(ctx, disk, composed.image, tell(j))
	record.wrote(result)
	report.Image.SHA256Written, report.Image.SHA256Read = result.DigestWritten, result.DigestRead
	report.Image.Written, report.Image.Unchanged, report.Image.Rewritten = result.Written+result.Zeroed+result.Head, result.Skipped, result.Rewritten
	if result.Rewritten > 0 {
		report.Warnings = append(report.Warnings, fmt.Sprintf("%d bytes came back wrong and were written once more: the disk is not to be trusted", result.Rewritten))
	}
	if err != nil {
		report.Image.Fault = string(media.FaultOf(err))
		// Who cancelled since the disk does not answer has to hear so.
		var device *media.DeviceError
		if ctx.Err() != nil && errors.As(err, &device) {
			return report, &api.Error{Name: api.ErrCancelled, Message: device.Error()}
		}
		return report, record.advise(err)
	}
	if result.DigestWritten != report.Image.SHA256Planned || result.DigestRead != report.Image.SHA256Planned {
		return report, &api.Error{Name: api.ErrVerification, Message: "what was written is not what was planned; the machine's memory or the cache's disk may be faulty"}
	}
	report.Written = true
	record.committed()
	if !bootTest {
		report.Verified = true
		report.Warnings = append(report.Warnings, "not booted in a virtual machine, as was asked for")
		return report, nil
	}
	f, err := to.reopen(ctx)
	if err != nil {
		return report, err
	}
	defer f.Close()
	return report, s.prove(ctx, j, report, f, sys.Manifest)
}

// prove boots the disk f, which holds the system m, under each firmware that it
// is made for, in the least memory that m says it needs, and adds the verdicts
// to the report. The error says that not all of them booted.
func (s *Server) prove(ctx context.Context, j *jobs.Job, report *api.Report, f *os.File, m api.Manifest) error {
	var failed []string
	for _, fw := range firmwares {
		if !slices.Contains(m.Boot, string(fw)) {
			continue
		}
		why, err := s.tryBoot(ctx, j, report, testvm.Machine{Firmware: fw, Disk: f, DiskSize: report.Target.Size, SectorSize: report.Target.SectorSize, Bus: testvm.USB,
			MemoryMiB: leastMemory(m, fw)}, expect(m))
		if err != nil {
			return err
		}
		if why != "" {
			failed = append(failed, why)
		}
	}
	if len(failed) > 0 {
		what := "it is not proven that it boots"
		if report.Written {
			what = "written and read back, but " + what
		}
		return &api.Error{Name: api.ErrVerification, Message: what + ": " + strings.Join(failed, "; ")}
	}
	report.Verified = true
	return nil
}

// leastMemory is in MiB.
func leastMemory(m api.Manifest, fw testvm.Firmware) int {
	if fw == testvm.UEFI {
		return m.Memory.UEFI
	}
	return m.Memory.BIOS
}

// expect is what a machine shows that boots the system m.
func expect(m api.Manifest) testvm.Expect {
	return testvm.Expect{Build: m.ID, Shell: m.Shell, Content: m.Initramfs.Unpacked}
}

// tryBoot boots the machine and adds the verdict to the report. It returns why
// what is wanted is not proven, or ctx's error.
func (s *Server) tryBoot(ctx context.Context, j *jobs.Job, report *api.Report, machine testvm.Machine, want testvm.Expect) (why string, err error) {
	machine.Dir = s.reportDir(j.ID())
	name := strings.ToUpper(string(machine.Firmware))
	j.Begin(bootPhase(machine.Firmware))
	v, err := s.boot(ctx, j.Snapshot().Owner, machine, want)
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if err != nil {
		v.Reason = err.Error()
	}
	report.Boots = append(report.Boots, api.Boot{Firmware: string(machine.Firmware), OK: v.OK, Skipped: v.Skipped, Reason: v.Reason, Reached: v.Reached,
		GRUB: v.ToGRUB, Kernel: v.ToKernel, Ready: v.ToReady, RAM: v.RAMMiB, Shell: v.Shell, Accel: v.Accelerator, QEMU: v.QEMUVersion,
		ConsoleLog: v.ConsoleLog, Screenshot: v.Screenshot})
	if v.OK && want.Shell && !v.Shell {
		report.Warnings = append(report.Warnings, name+": the shell on the serial console did not answer")
	}
	if !v.OK && !v.Skipped {
		return name + ": " + v.Reason, nil
	}
	return "", nil
}

// boot proves one machine of the user, when there is room for one more.
func (s *Server) boot(ctx context.Context, uid uint32, m testvm.Machine, want testvm.Expect) (testvm.Verdict, error) {
	done, err := s.guests.enter(ctx, uid)
	if err != nil {
		return testvm.Verdict{}, err
	}
	defer done()
	m.Launch = s.qemu()
	return testvm.Prove(ctx, m, want, nil)
}

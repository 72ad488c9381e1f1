"""ROOT on workers here and on hosts, by programs of their own, compared with serial bin by bin."""

from __future__ import annotations

import importlib.util
import json
import site
import subprocess
import sys
import textwrap

import pytest
from functions import script_environ

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ROOT") is None,
        reason="there is no ROOT; its wheel is had by: pip install --pre root",
    ),
]

PRELUDE = """
import json, os, random, re, sys, time, warnings
warnings.simplefilter("ignore")
from ostap_parallel import WorkManager, WorkerLost, SerializeError
SETTINGS = json.loads(sys.argv[1])

def open_(ncpus=2, **more):
    where = {"ncpus": 0, **SETTINGS} if SETTINGS else {"ncpus": ncpus}
    return WorkManager(**{"silent": True, **where, **more})

def bins(histogram):
    return [histogram.GetBinContent(n) for n in range(histogram.GetNbinsX() + 2)]

def tell(**what):
    print(json.dumps(what))

def parent_of(pid):
    try:
        return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
    except OSError:
        return 0
"""


class Root:
    """Runs programs that open managers of workers in one place."""

    def __init__(self, settings, directory):
        self._settings, self._directory = settings, directory

    def run(self, program, **environment):
        """Return what a program has told, and what is on its standard error."""
        file = self._directory / "program.py"
        file.write_text(PRELUDE + textwrap.dedent(program))
        done = subprocess.run(
            [sys.executable, str(file), json.dumps(self._settings)],
            cwd=self._directory,
            env=script_environ(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert done.returncode == 0, f"{done.returncode}\n{done.stdout}{done.stderr}"
        return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(params=["local", "hosts"])
def root(request, tmp_path):
    settings = {}
    if request.param == "hosts":
        paths = ":".join(site.getsitepackages())
        settings = {
            "servers": "h1*1 h2*1",
            "ssh_config": str(request.getfixturevalue("hosts").ssh_config),
            "config": [],
            "environment": f"export PYTHONPATH={paths}",
        }
    return Root(settings, tmp_path)


@pytest.fixture
def local(tmp_path):
    return Root({}, tmp_path)


class TestObjects:
    def test_histograms_travel_in_every_way(self, root):
        told, _ = root.run("""
            import ROOT

            def fill(number):
                histogram = ROOT.TH1F(f"h{number}", "", 20, 0, 20)
                for n in range(100):
                    histogram.Fill(n * number % 23)
                return histogram

            hist = fill(7)
            first = fill(3)

            def make():
                inner = fill(5)
                return lambda item: bins(inner) + bins(item) + bins(hist)





            def both(item, h):
                return bins(h) + bins(item)

            def add(one, two):
                one.Add(two)
                return one

            items = [fill(n) for n in range(1, 6)]
            with open_() as wm:
                results = wm.process(fill, range(1, 6))
                tell(
                    results=[bins(one) for one in results] == [bins(fill(n)) for n in range(1, 6)],
                    types=sorted({type(one).__name__ for one in results}),
                    names=[one.GetName() for one in results] == [f"h{n}" for n in range(1, 6)],
                    closure=wm.process(make(), items) == [make()(item) for item in items],
                    shared=wm.process(both, items, shared={"h": hist})
                    == [both(item, hist) for item in items],
                    merged=bins(wm.process(fill, range(1, 6), merger=add))
                    == [float(sum(column)) for column in zip(*map(bins, items))],
                )
        """)
        assert told.pop("types") == ["TH1F"]
        assert set(told.values()) == {True}

    def test_results_in_a_caller_that_has_not_used_it(self, root):
        told, _ = root.run("""
            def fill(number):
                import ROOT
                histogram = ROOT.TH1F("h", "", 3, 0, 3)
                histogram.Fill(1, number)
                return histogram, ROOT.TLorentzVector(1, 2, 3, 4), ROOT.std.vector["int"]([1, 2])

            before = "ROOT" in sys.modules
            with open_() as wm:
                found = wm.process(fill, range(4))
            tell(
                before=before,
                bins=[bins(one)[2] for one, _, _ in found],
                vectors=[(vector.X(), list(numbers)) for _, vector, numbers in found],
            )
        """)
        assert told == {
            "before": False,
            "bins": [0.0, 1.0, 2.0, 3.0],
            "vectors": [[1.0, [1, 2]]] * 4,
        }

    def test_functions_methods_and_classes(self, root):
        told, _ = root.run("""
            import ROOT
            from ROOT import TMath, gRandom, kRed

            hist = ROOT.TH1F("h", "", 10, 0, 10)
            hist.FillRandom("gaus", 1000)

            def named(item):
                return TMath.Gaus(item), int(kRed), ROOT.RooFit.FATAL == ROOT.RooFit.MsgLevel(item)

            def draw(item):
                gRandom.SetSeed(item + 1)
                return gRandom.Rndm() == ROOT.gRandom.Rndm()  # the same generator

            def both(item):
                gRandom.SetSeed(item + 1)
                first = ROOT.gRandom.Rndm()
                return first, gRandom.GetSeed() == ROOT.gRandom.GetSeed()

            class Event(ROOT.TNamed):
                def __init__(self, name):
                    super().__init__(name, "")

                def GetTitle(self):
                    return 2 * self.GetName()


            def made(item):
                return Event("a" * item).GetTitle()

            none, null = ROOT.gROOT.FindObject("no such"), ROOT.nullptr

            def nothing(item):
                return item == ROOT.nullptr and null == item and not none

            vector = ROOT.RooArgSet()
            kinds = [ROOT.TH1F, ROOT.std.vector["int"]]
            with open_() as wm:
                try:
                    wm.process(vector.add, [1])
                    template = ""
                except SerializeError as exc:
                    template = str(exc)
                tell(
                    method=wm.process(hist.GetBinContent, range(12)) == bins(hist),
                    function=wm.process(TMath.Gaus, [0.0, 1.0]) == [TMath.Gaus(0), TMath.Gaus(1)],
                    named=wm.process(named, range(6)) == [named(n) for n in range(6)],
                    cls=[one.GetTitle() for one in wm.process(lambda n: ROOT.TNamed("a", n), "b")],
                    kinds=wm.process(lambda kind: kind.__cpp_name__, kinds),
                    made=wm.process(made, range(3)),
                    nothing=wm.process(nothing, [null, none]) == [True, True],
                    generators=wm.process(both, range(4)) == [both(n) for n in range(4)],
                    template=template,
                )
        """)
        assert "in a function of Python" in told.pop("template")
        assert told.pop("cls") == ["b"]
        assert told.pop("kinds") == ["TH1F", "std::vector<int>"]
        assert told.pop("made") == ["", "aa", "aaaa"]
        assert set(told.values()) == {True}

    def test_toys_fits_and_data(self, root):
        told, _ = root.run("""
            import ROOT

            def toy(item):
                ROOT.RooMsgService.instance().setGlobalKillBelow(ROOT.RooFit.FATAL)
                x = ROOT.RooRealVar("x", "", -5, 5)
                mean = ROOT.RooRealVar("mean", "", 0, -2, 2)
                sigma = ROOT.RooRealVar("sigma", "", 1, 0.1, 3)
                gauss = ROOT.RooGaussian("gauss", "", x, mean, sigma)
                data = gauss.generate({x}, 200)
                gauss.fitTo(data, PrintLevel=-1)
                return mean.getVal(), mean.getError(), data

            with open_() as wm:
                one = wm.process(toy, range(4), seed=5)
                two = wm.process(toy, range(4), seed=5, chunk_size=4)
                three = wm.process(toy, range(4))
                four = wm.process(toy, range(4), chunk_size=1)
            numbers = [[fit[:2] for fit in run] for run in (one, two, three, four)]
            tell(
                same=numbers[0] == numbers[1],
                distinct=len({fit for run in numbers[1:] for fit in run}),
                entries=[fit[2].numEntries() for fit in one],
                means=[fit[2].mean(fit[2].get()["x"]) for fit in one]
                == [fit[2].mean(fit[2].get()["x"]) for fit in two],
            )
        """)
        assert told == {"same": True, "distinct": 12, "entries": [200] * 4, "means": True}

    def test_results_of_fits(self, root):
        told, _ = root.run("""
            import ROOT

            def fit(seed):
                histogram = ROOT.TH1D("h", "", 20, -3, 3)
                generator = ROOT.TRandom3(seed)
                for _ in range(500):
                    histogram.Fill(generator.Gaus())
                return histogram.Fit("gaus", "SQN"), histogram.Fit("gaus", "QN")

            def numbers(pair):
                result, status = pair
                covariance = result.CovMatrix(1, 2)
                told = result.Parameter(1), result.Status(), int(result), covariance
                return *told, int(status), bool(status.Get())

            def both(seed):
                pair = fit(seed)
                return pair, numbers(pair)

            with open_() as wm:
                for pair, expected in wm.process(both, [1, 2]):
                    assert numbers(pair) == expected
                pair = fit(3)
                assert wm.process(numbers, [pair]) == [numbers(pair)]
                tell(good=True)
        """)
        assert told == {"good": True}

    def test_the_present_directory_and_pad_are_those_there(self, root):
        told, _ = root.run("""
            import ROOT
            from ROOT import gDirectory, gPad

            def look(item):
                file = ROOT.TMemFile("there", "RECREATE")  # the present one, as long as it is
                histogram = ROOT.TH1F("h", "", 1, 0, 1)
                found = gDirectory.GetName(), gDirectory.Get("h") == histogram, bool(gPad)
                canvas = ROOT.TCanvas("canvas")
                return *found, gPad.GetName()

            with open_() as wm:
                found = wm.process(look, range(2))
                same = wm.process(lambda one: one is ROOT.gDirectory, [gDirectory])
            tell(found=found, same=same)
        """)
        assert told == {"found": [["there", True, False, "canvas"]] * 2, "same": [True]}

    def test_what_belongs_to_a_file_or_an_event_loop_is_refused(self, root):
        told, _ = root.run("""
            import ROOT

            ROOT.gInterpreter.Declare("struct NoDefault { NoDefault(int x) : v(x) {} int v; };")
            ROOT.RDataFrame(5).Define("x", "1.0 * rdfentry_").Snapshot("t", "tree.root")
            frame = ROOT.RDataFrame(5).Define("x", "1.0 * rdfentry_")
            counted, file = frame.Count(), ROOT.TFile.Open("tree.root")
            tree, reader = file["t"], ROOT.TTreeReader("t", file)
            plain, odd = ROOT.RDataFrame(5), ROOT.NoDefault(1)
            chain = ROOT.TChain("t")
            chain.Add(os.path.abspath("tree.root"))
            found = {}
            with open_() as wm:
                for name in "frame", "counted", "file", "tree", "reader", "plain", "odd":
                    try:
                        wm.process(eval(f"lambda x: {name}"), [1])
                    except SerializeError as exc:
                        found[name] = str(exc)
                bound = frame.Filter
                try:
                    wm.process(lambda x: bound, [1])
                except SerializeError as exc:
                    found["bound"] = str(exc)
            tell(**found)
        """)
        here = "make it in the function"
        advice = {"frame": here, "plain": here, "bound": here, "reader": here}
        advice |= {"counted": "GetValue()", "file": "open the file in the task"}
        advice |= {"tree": "use a TChain", "odd": "no constructor without arguments"}
        assert told.keys() == advice.keys()
        assert all(advice[name] in text for name, text in told.items()), told


class TestOptions:
    def test_what_a_program_tells_root_holds_on_workers(self, root):
        told, errors = root.run("""
            COMMA = '''
            #include <locale>
            struct Comma : std::numpunct<char> {
              char do_decimal_point() const override { return ','; }
            };
            void use_comma() { std::locale::global(std::locale(std::locale(), new Comma)); }
            '''

            def look(_):
                import ROOT
                service, options = ROOT.RooMsgService.instance(), ROOT.Math.MinimizerOptions
                histogram = ROOT.TH1D("h", "", 2, 0, 1)
                config = ROOT.RooAbsReal.defaultIntegratorConfig()
                return (
                    *(histogram.GetSumw2N(), bool(histogram.GetDirectory())),
                    *(int(ROOT.gErrorIgnoreLevel), int(service.globalKillBelow())),
                    *(int(service.getStream(1).topic), config.epsRel()),
                    *(str(options.DefaultMinimizerType()), str(options.DefaultMinimizerAlgo())),
                    *(options.DefaultTolerance(), options.DefaultStrategy()),
                    *(ROOT.gStyle.GetOptStat(), ROOT.gStyle.GetOptFit()),
                )

            def warn(_):
                import ROOT
                ROOT.Warning("here", "must not be seen")

            with open_() as wm:
                first = wm.process(look, [1])
                import ROOT
                ROOT.gInterpreter.Declare(COMMA)
                ROOT.use_comma()
                ROOT.TH1.SetDefaultSumw2()
                ROOT.TH1.AddDirectory(False)
                ROOT.gROOT.ProcessLine("gErrorIgnoreLevel = kError;")
                ROOT.RooMsgService.instance().setGlobalKillBelow(ROOT.RooFit.ERROR)
                ROOT.RooMsgService.instance().getStream(1).removeTopic(ROOT.RooFit.Fitting)
                ROOT.RooAbsReal.defaultIntegratorConfig().setEpsRel(1e-9)
                ROOT.Math.MinimizerOptions.SetDefaultMinimizer("Minuit", "Simplex")
                ROOT.Math.MinimizerOptions.SetDefaultTolerance(0.25)
                ROOT.Math.MinimizerOptions.SetDefaultStrategy(2)
                ROOT.gStyle.SetOptStat(0)
                ROOT.gStyle.SetOptFit(111)
                told = {"kept": wm.process(look, [1]) == [look(1)] != first}
                told["submitted"] = wm.executor.submit(look, 1).result() == look(1)
                wm.process(warn, [1])
                ROOT.gErrorIgnoreLevel = -1
                ROOT.TH1.AddDirectory(True)
                told["back"] = wm.process(look, [1]) == [look(1)]
            with open_() as wm:
                told["next"] = wm.process(look, range(4)) == [look(1)] * 4
            tell(**told)
        """)
        assert told == {"kept": True, "submitted": True, "back": True, "next": True}
        assert "must not be seen" not in errors


class TestRandomNumbers:
    def test_they_are_those_of_the_item(self, root):
        told, _ = root.run("""
            import numpy

            def draw(item):
                import ROOT
                roofit = ROOT.RooRandom.randomGenerator().Rndm()
                return ROOT.gRandom.Rndm(), roofit, numpy.random.random(), random.random()

            def late(item):
                first = random.random()
                import ROOT
                return first, ROOT.gRandom.Rndm()

            runs = []
            for size in (1, 3):
                with open_() as wm:
                    runs.append(wm.process(draw, range(6), seed="s", chunk_size=size))
                    runs.append(wm.process(late, range(6), seed="s", chunk_size=size))
            with open_() as wm:
                free = [wm.process(draw, range(6), chunk_size=n) for n in (1, 3)]
            with open_() as wm:
                free.append(wm.process(draw, range(6)))
            tell(
                same=runs[0] == runs[2] and runs[1] == runs[3],
                seeded=[len(set(column)) for column in zip(*runs[0])],
                free=[len(set(column)) for column in zip(*sum(free, []))],
            )
        """)
        assert told == {"same": True, "seeded": [6] * 4, "free": [18] * 4}

    def test_a_run_without_a_seed_after_one_that_had_one(self, local):
        program = """
            def draw(item):
                import ROOT
                return ROOT.gRandom.Rndm(), random.random()

            with open_(1) as wm:
                wm.process(draw, range(2), seed=1)
                tell(found=wm.process(draw, range(2)))
        """
        one, two = (local.run(program)[0]["found"] for _ in range(2))
        assert len({number for pair in one + two for number in pair}) == 8


class TestCrashes:
    PROGRAM = """
        def crash(item):
            import ROOT
            if item == 1:
                things = ROOT.TList()
                things.Add(ROOT.bind_object(8, "TH1F"))
                things.Print()
            return item

        with open_() as wm:
            wm.process(abs, range(4))
            begin = time.monotonic()
            results = wm.process(crash, range(4), on_error="collect", lost_retries=1)
            (failed,) = wm.report.failures
        results = [one if isinstance(one, int) else None for one in results]
        tell(results=results, reason=str(failed.error), seconds=time.monotonic() - begin)
    """

    def test_it_is_told_in_brief(self, root):
        told, error = root.run(self.PROGRAM, DISPLAY=":99")
        assert told["results"] == [0, None, 2, 3]
        assert "was killed by SIGSEGV" in told["reason"]
        assert "TCollection::Print" in error
        assert "in crash" in error
        traces = error.count("Fatal Python error")
        assert traces == 2
        lines = [line for line in error.splitlines() if "Extension modules" not in line]
        assert len(lines) <= 35 * traces

    def test_time_limits_hold_for_who_begins_it(self, root):
        told, _ = root.run("""
            from ostap_parallel import TaskTimeout

            def hang(item):
                import ROOT
                ROOT.gROOT.GetName()
                while item:
                    time.sleep(0.01)
                return item

            with open_(start="spawn") as wm:
                results = wm.process(hang, range(2), timeout=15, on_error="collect")
                (failed,) = wm.report.failures
            tell(results=[results[0], type(results[1]).__name__], kind=type(failed.error).__name__)
        """)
        assert told == {"results": [0, "Failure"], "kind": "TaskTimeout"}


class TestTemplate:
    PROGRAM = """
        {first}

        def look(item):
            loaded = "cppyy" in sys.modules
            import ROOT
            ROOT.TH1F("h", "", 10, 0, 10).Fill(1)
            text = open("/proc/self/smaps_rollup").read()
            private = re.findall(r"Private_(?:Dirty|Clean): *(\\d+)", text)
            return loaded, ROOT.gROOT.IsBatch(), sum(map(int, private)) / 1024

        with open_({options}) as wm:
            tell(found=wm.process(look, range(2)))
    """

    @pytest.mark.parametrize(
        ("first", "options", "expected"),
        [
            ("import ROOT; ROOT.gROOT.GetName()", "", True),
            ("", "preload='ROOT'", True),
            ("", "", False),
        ],
        ids=["the session has it", "preload", "neither"],
    )
    def test_it_is_imported_once(self, root, first, options, expected):
        told, _ = root.run(self.PROGRAM.format(first=first, options=options))
        for loaded, is_batch, private in told["found"]:  # MB
            assert loaded is expected
            assert is_batch
            assert (private < 10) is expected

    def test_a_session_that_imports_it_later(self, local):
        told, _ = local.run("""
            def look(item):
                return "cppyy" in sys.modules, os.getppid(), os.getpid()

            with open_() as wm:
                before = wm.process(look, range(2))
                import ROOT
                ROOT.gROOT.GetName()
                after = wm.process(look, range(2))
                again = wm.process(look, range(2))
            found = before, after, again
            tell(
                loaded=[sorted({one[0] for one in run}) for run in found],
                parents=len({one[1] for run in found for one in run}),
                replaced={one[2] for one in before}.isdisjoint(one[2] for one in after),
                kept=len({one[2] for one in after + again}) <= 2,
            )
        """)
        assert told == {
            "loaded": [[False], [True], [True]],
            "parents": 1,
            "replaced": True,
            "kept": True,
        }

    def test_a_host_without_it_does_not_matter(self, hosts, tmp_path):
        settings = {"servers": "h1*1", "ssh_config": str(hosts.ssh_config), "config": []}
        root = Root(settings, tmp_path)
        told, error = root.run("""
            import ROOT
            ROOT.gROOT.GetName()

            with open_() as wm:
                tell(found=wm.process(abs, [-1, -2]))
        """)
        assert told == {"found": [1, 2]}
        assert "ROOT" not in error.replace("alpha stage", "")


class TestDeclared:
    FILES = """
        from pathlib import Path
        from ostap_parallel import root as our
        import ROOT

        Path("macro.C").write_text('#include "inner.h"\\nint macro() { return inner() + 1; }\\n')
        Path("inner.h").write_text("#pragma once\\ninline int inner() { return 1; }\\n")
        Path("alone.h").write_text(
            "struct Alone { int a = 0; int twice() const { return 2 * a; } };\\n"
            "template <class T> T doubled(T x) { return x + x; }\\n"
        )
    """

    def test_code_files_and_libraries(self, root):
        told, _ = root.run(
            self.FILES
            + """
        our.declare("int plain(int x) { return x + 100; }", "alone.h")
        our.declare("libPhysics")
        our.declare("libPhysics", Path("alone.h"))  # again: nothing happens
        made = ROOT.Alone()
        made.a = 4

        def call(item):
            new = ROOT.Alone()
            new.a = item + made.a
            return ROOT.plain(item), ROOT.doubled(item), new.twice(), new

        with open_() as wm:
            found = wm.process(call, range(4))
            later = wm.executor.submit(call, 5).result()
            our.declare("int added(int x) { return x + 1000; }")
            tell(
                found=[(*one[:3], one[3].a) for one in found],
                later=later[:3],
                added=wm.process(ROOT.added, range(2)),
                submitted=wm.executor.submit(ROOT.added, 5).result(),
                libraries=wm.process(
                    lambda item: "libPhysics" in str(ROOT.gSystem.GetLibraries()), range(2)
                ),
            )
        """
        )
        assert told == {
            "found": [[n + 100, 2 * n, 2 * (n + 4), n + 4] for n in range(4)],
            "later": [105, 10, 18],
            "added": [1000, 1001],
            "submitted": 1005,
            "libraries": [True, True],
        }

    def test_macros_and_preload(self, local):
        told, _ = local.run(
            self.FILES
            + """
        def call(item):
            return ROOT.macro() + item

        def twice(item):
            return ROOT.doubled(item)

        with open_(preload=["ROOT", "alone.h", Path("macro.C"), "libPhysics.so"]) as wm:
            preloaded = wm.process(call, range(2)), wm.process(twice, range(2))
        our.declare("macro.C")
        with open_() as wm:
            declared = wm.process(call, range(2))
        from ostap_parallel import ConfigError
        try:
            WorkManager(1, preload="nowhere.C")
        except ConfigError as exc:
            error = str(exc)
        tell(preloaded=preloaded, declared=declared, error=error)
        """
        )
        assert "no such file" in told.pop("error")
        assert told == {"preloaded": [[2, 3], [0, 2]], "declared": [2, 3]}

    def test_preload_on_hosts(self, root):
        told, _ = root.run(
            self.FILES
            + """
        with open_(preload=["alone.h"]) as wm:
            tell(found=wm.process(lambda item: ROOT.doubled(item), range(2)))
        """
        )
        assert told == {"found": [0, 2]}

    def test_what_is_not_declared_is_told(self, root):
        told, _ = root.run("""
            import ROOT
            ROOT.gInterpreter.Declare("int mine(int x) { return x; } struct Kept { int a = 3; };")
            ROOT.gInterpreter.Declare("namespace N { int my() { return 1; } }")
            kept = ROOT.Kept()

            def error_of(function):
                try:
                    wm.process(function, [1])
                except Exception as exc:
                    return " ".join([type(exc).__name__, str(exc), *getattr(exc, "__notes__", ())])

            with open_() as wm:
                tell(
                    attribute=error_of(lambda item: ROOT.mine(item)),
                    inner=error_of(lambda item: ROOT.N.my()),
                    name=error_of(ROOT.mine),
                    kept=error_of(lambda item: kept),
                    other=error_of(lambda item: ROOT.no_such_thing),
                )
        """)
        assert "declare" not in told.pop("other")
        for text in told.values():
            assert "ostap_parallel.root.declare" in text
        assert told["attribute"].startswith("AttributeError")

    def test_what_python_has_set_on_a_class_is_told(self, local):
        told, _ = local.run("""
            import ROOT

            def total(self):
                return self.Integral()

            ROOT.TH1.total = total

            def use(item):
                histogram = ROOT.TH1D("h", "", 2, 0, 1)
                return histogram.total() if item else histogram.no_such_thing

            found = []
            with open_() as wm:
                for item in 1, 0:
                    try:
                        wm.process(use, [item])
                    except AttributeError as exc:
                        found.append(" ".join([str(exc), *getattr(exc, "__notes__", ())]))
            tell(first=found[0], second=found[1])
        """)
        assert "TH1D has total here" in told["first"]
        assert "worker_init" in told["first"]
        assert "worker_init" not in told["second"]

    def test_what_is_wrong_is_told_at_once(self, local):
        told, _ = local.run("""
            from ostap_parallel import root as our
            errors = []
            for wrong in ("int x( {", "nonsense", "libNoSuchThing", "none.C"):
                try:
                    our.declare(wrong)
                except Exception as exc:
                    errors.append(f"{type(exc).__name__} {exc}")
            tell(errors=errors)
        """)
        code, nonsense, library, file = told["errors"]
        assert "does not accept" in code
        assert "neither" in nonsense
        assert "LD_LIBRARY_PATH" in library
        assert "No such file" in file
        assert all(text.startswith("DeclarationError") for text in told["errors"])

    def test_on_processes_of_others(self, local):
        told, _ = local.run("""
            from concurrent.futures import ProcessPoolExecutor
            import multiprocessing
            from ostap_parallel import root as our
            import ROOT

            our.declare("int plain(int x) { return x + 100; }")
            hist = ROOT.TH1F("h", "", 3, 0, 3)
            hist.Fill(1)
            if __name__ == "__main__":
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    with WorkManager(executor=pool, silent=True) as wm:
                        draw = lambda item: ROOT.gRandom.Rndm()
                        one, two = (wm.process(draw, range(3), seed=1) for _ in range(2))
                        tell(
                            found=wm.process(lambda item: ROOT.plain(item), range(2)),
                            bins=[bins(one) for one in wm.process(lambda item: hist, [1])],
                            same=one == two,
                        )
        """)
        assert told == {"found": [100, 101], "bins": [[0, 0, 1, 0, 0]], "same": True}


class TestMissing:
    def test_what_sync_cannot_send(self, hosts, tmp_path):
        settings = {"servers": "h1*1", "ssh_config": str(hosts.ssh_config), "config": []}
        told, _ = Root(settings, tmp_path).run("""
            def use(item):
                import ROOT

            with open_() as wm:
                try:
                    wm.process(use, [1])
                except ModuleNotFoundError as exc:
                    tell(text=str(exc) + " ".join(getattr(exc, "__notes__", ())))
        """)
        for word in ("python=", "profile=", "environment="):
            assert word in told["text"]
        assert "sync=, else" not in told["text"]


class TestCheckpoints:
    PROGRAM = """
        import ROOT
        ROOT.RooMsgService.instance().setGlobalKillBelow(ROOT.RooFit.FATAL)
        from ROOT import gRandom
        from pathlib import Path

        for name in "data.root", "other.root":
            if not Path(name).exists():
                file = ROOT.TFile(name, "RECREATE")
                tree = ROOT.TTree("tree", "")
                tree.Write()
                file.Close()
        x = ROOT.RooRealVar("x", "", -5, 5)
        mean = ROOT.RooRealVar("mean", "", {mean}, -2, 2)
        sigma = ROOT.RooRealVar("sigma", "", 1, 0.1, 3)
        gauss = ROOT.RooGaussian("gauss", "", x, mean, sigma)
        ROOT.RooRandom.randomGenerator().SetSeed({seed})
        data = gauss.generate({{x}}, 100)
        space = ROOT.RooWorkspace("space")
        space.factory("Gaussian::inner(y[-5,5],m[{workspace}],s[1])")
        chain = ROOT.TChain("tree")
        chain.Add("data.root")
        chain.Add("{file}")
        hist = ROOT.TH1F("h", "", 3, 0, 3)
        hist.Fill({fill})

        class Node:
            def __init__(self, name):
                self.name, self.beside = name, set()

        nodes = [Node(n) for n in range(20)]
        for n, node in enumerate(nodes):
            node.beside |= {{nodes[n - 1], nodes[n - 7], nodes[3]}}

        def use(item):
            gauss, data, space, chain, hist, nodes, gRandom
            print("runs")
            return item

        try:
            with open_() as wm:
                tell(found=wm.process(use, range(3), checkpoint="run.db"))
        except Exception as exc:
            tell(found=str(exc))
    """

    def test_they_are_told_by_what_they_hold(self, local):
        same = {"mean": 0.5, "seed": 1, "workspace": 0.25, "file": "data.root", "fill": 1}
        for _ in range(2):
            told, _ = local.run(self.PROGRAM.format(**same))
            assert told == {"found": [0, 1, 2]}
        changed = {"mean": 0.6, "seed": 2, "workspace": 0.3, "file": "other.root", "fill": 2}
        told, _ = local.run(self.PROGRAM.format(**changed))
        for name in "gauss", "data", "space", "chain", "hist":
            assert f"global {name}" in told["found"]
        assert "left out" in told["found"]
        assert "global nodes" not in told["found"]


class TestNextManager:
    def test_it_takes_over_what_starts_workers(self, local):
        told, _ = local.run("""
            import signal
            from ostap_parallel.machine import templates
            import ROOT
            ROOT.gROOT.GetName()

            def look(item):
                return os.getppid(), "libRooFitCore" in str(ROOT.gSystem.GetLibraries())

            def open_and_look(**more):
                with open_(1, **more) as wm:
                    return wm.process(look, [1])[0]

            found = [open_and_look()]
            found.append(open_and_look())
            ROOT.RooRealVar("x", "", 0, 1)
            found.append(open_and_look(preload="ROOT"))
            other = open_and_look(preload="ROOT, colorsys")[0]
            os.kill(found[-1][0], signal.SIGKILL)
            killed = open_and_look()[0]
            with open_(1) as one, open_(1) as two:
                both = [wm.process(look, [1])[0][0] for wm in (one, two)]
            templates.IDLE = 0.1
            open_and_look()
            (last,) = templates._waiting
            pids = [pid for pid, _ in found]
            tell(
                same=len(set(pids)),
                loaded=[loaded for _, loaded in found],
                distinct=len({pids[0], other, killed}),
                both=len({*both}) == 2 and killed in both,
                status=last.process.wait(60),
                again=open_and_look()[1],
            )
        """)
        assert told == {
            "same": 1,
            "loaded": [False, False, True],
            "distinct": 3,
            "both": True,
            "status": -9,
            "again": True,
        }

    def test_nothing_is_left_of_the_one_before(self, local):
        told, _ = local.run("""
            import subprocess
            from ostap_parallel import root as our
            import ROOT
            ROOT.gROOT.GetName()

            def leave(item):
                os.chdir("/")
                os.environ["LEFT"] = "x"
                subprocess.Popen(["sleep", "1000"])
                ROOT.gRandom.SetSeed(5)
                return os.getpid()

            def look(item):
                return os.environ.get("LEFT"), os.getcwd(), os.environ["SET"], ROOT.mine(item)

            with open_(1) as wm:
                (pid,) = wm.process(leave, [1])
            os.environ["SET"] = "y"
            our.declare("int mine(int x) { return x + 1; }")
            os.makedirs("below")
            os.chdir("below")
            with open_(1) as wm:
                found = wm.process(look, [1])
            left = [p for p in os.listdir("/proc") if p.isdigit() and parent_of(p) == pid]
            pid = os.fork()  # it has none of it
            if not pid:
                with open_(1) as wm:
                    wm.process(abs, [1])
                os._exit(0)
            forked = os.waitpid(pid, 0)[1]
            tell(found=found, cwd=os.getcwd(), left=left, forked=forked)
        """)
        cwd = told["cwd"]
        assert told == {"found": [[None, cwd, "y", 2]], "cwd": cwd, "left": [], "forked": 0}


class TestOstap:
    def test_tasks_of_its_kind(self, root):
        told, _ = root.run("""
            import ROOT
            from ostap_parallel.ostap import GenericTask, Task
            from ostap_parallel.ostap import WorkManager as Ostaps

            def fill(jobid, n):
                import ROOT
                histogram = ROOT.TH1F(f"h{jobid}", "", 10, 0, 10)
                for k in range(n):
                    histogram.Fill((jobid * n + k) % 12)
                return histogram

            def merge(one, two):
                if not one:
                    return two
                one.Add(two)
                return one

            class Fill(Task):
                def __init__(self):
                    self.__histo = None

                def initialize_local(self):
                    self.__histo = None

                def process(self, jobid, n):
                    assert self.__histo is None  # what others have left
                    self.__histo = fill(jobid, n)
                    return self.__histo

                def merge_results(self, result, jobid=-1):
                    self.__histo = merge(self.__histo, result)

                def results(self):
                    return self.__histo

            items = [7] * 12
            expected = None
            for jobid, n in enumerate(items):
                expected = merge(expected, fill(jobid, n))
            where = {**SETTINGS, "ppservers": SETTINGS.get("servers", ())}
            where.pop("servers", None)

            def manager():
                return Ostaps(0 if SETTINGS else 2, progress=False, silent=True, **where)

            task = Fill()
            found = [
                manager().process(task, items),
                manager().process(fill, items, merger=merge),
                manager().process(GenericTask(processor=fill, merger=merge), items),
            ]
            tell(same=[bins(one) == bins(expected) for one in found])
        """)
        assert told == {"same": [True] * 3}

    def test_modes(self, local):
        told, _ = local.run("""
            import ROOT
            from ostap_parallel.ostap import Task
            from ostap_parallel.ostap import WorkManager as Ostaps

            class Look(Task):
                def __init__(self):
                    self.found = []

                def initialize_local(self):
                    self.found = []

                def process(self, jobid, item):
                    root = ROOT.ROOT
                    threads = root.GetThreadPoolSize() if root.IsImplicitMTEnabled() else 0
                    return [ROOT.gROOT.IsBatch(), threads, str(ROOT.gSystem.GetBuildDir())]

                def merge_results(self, result, jobid=-1):
                    self.found.append(result)

                def results(self):
                    return self.found

            task = Look()
            with Ostaps(1, progress=False) as manager:
                (plain,) = manager.process(task, [1])
                task.batch, task.implicitMT, task.build = False, 2, os.getcwd()
                (set_,) = manager.process(task, [1])
                other = Look()
                (after,) = manager.process(other, [1])
            tell(plain=plain[:2], set_=[*set_[:2], set_[2] == os.getcwd()], after=after == plain)
        """)
        assert told == {"plain": [True, 0], "set_": [False, 2, True], "after": True}

    def test_a_new_manager_has_what_tasks_derive_from(self, local):
        told, _ = local.run("""
            import ROOT
            ROOT.gROOT.GetName()
            from ostap_parallel.ostap import WorkManager as Ostaps

            def look(jobid, item):
                return open(f"/proc/{os.getppid()}/comm").read().strip(), os.getppid()

            def find():
                return Ostaps(1, progress=False).process(look, [1], merger=lambda old, new: new)

            one, two = find(), find()
            tell(names=[one[0], two[0]], same=one == two)
        """)
        assert told == {"names": ["pptemplate"] * 2, "same": True}
